"""Several devices share the batches of calibration text and give the bytes of one."""

import time
from pathlib import Path

import pytest
import torch

from offline import PRESETS, ToolError, quantize
from offline.model.hidden_states import HiddenStates, _Replica
from offline.model.source import Source
from offline.pipeline import _devices
from offline.progress import silent
from offline.recipe import CalibrationSize, LearnedClips, Psot, PsotLayer
from offline.stages.fold import fold_layer
from tests.common.tiny import write_source

CPU = torch.device("cpu")
TEXT = "".join(f"The number {n} is followed by {n + 1}.\n" for n in range(500))
SMALL = {
    "calibration": CalibrationSize(sequences=7, sequence_length=32),
    "psot": Psot(steps=2, pool_tokens=200),
    "psot_layer": PsotLayer(epochs=1),
}


def weights_of(source: Path, preset: str, devices: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Return the checkpoint's shard from a run over `devices` devices with 3.5 batches of 64 tokens."""
    monkeypatch.setattr("offline.model.hidden_states.TOKENS_PER_BATCH", 64)
    monkeypatch.setattr("offline.pipeline._devices", lambda _: [CPU] * devices)
    recipe, text, output = PRESETS[preset], source.with_name("text.txt"), source.with_name(f"{devices}")
    text.write_text(TEXT)
    clips = LearnedClips(sequences=2, epochs=1) if recipe.learned_clips else None
    recipe = recipe.model_copy(update=SMALL | {"learned_clips": clips})
    quantize(source, output, recipe=recipe, calibration=str(text), progress=silent)
    return (output / "model-00001-of-00001.safetensors").read_bytes()


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_two_and_five_devices_write_the_bytes_that_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    source = write_source(tmp_path / "source")
    one, two, five = (weights_of(source, preset, devices, monkeypatch) for devices in (1, 2, 5))
    assert one == two == five


def test_observations_come_in_the_order_of_the_text_however_slow_a_device_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ran = _Replica.run, []

    def slowly(replica: _Replica, batch: torch.Tensor) -> None:
        order = len(ran)
        ran.append(replica)
        time.sleep(0.02 * (3 - order % 3))  # of three that begin together the first takes longest
        run(replica, batch)

    monkeypatch.setattr("offline.model.hidden_states.TOKENS_PER_BATCH", 16)
    monkeypatch.setattr(_Replica, "run", slowly)
    source = Source.open(write_source(tmp_path / "source"))
    tokens = torch.arange(7 * 16).view(7, 16) % source.shape.vocab_size
    seen: dict[int, list[torch.Tensor]] = {}
    for devices in (1, 3):
        hidden, seen[devices] = HiddenStates(source, tokens, None, [CPU] * devices), []
        hidden.forward_layer(
            fold_layer(source, 0, None), ["mlp.down_proj"], lambda _, x, own=seen[devices]: own.append(x)
        )
    assert len({id(replica) for replica in ran}) == 1 + 3
    assert len(seen[3]) == 7
    assert all(torch.equal(one, three) for one, three in zip(seen[1], seen[3], strict=True))


def test_a_batch_that_fails_ends_the_run_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(replica: _Replica, batch: torch.Tensor) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(_Replica, "run", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        weights_of(write_source(tmp_path / "source"), "fast", 2, monkeypatch)
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("name", "visible", "found"),
    [
        ("auto", 0, ["cpu"]),
        ("auto", 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda", 3, ["cuda:0"]),
        ("cpu", 3, ["cpu"]),
    ],
)
def test_all_visible_devices_are_used_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, visible: int, found: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    assert [str(device) for device in _devices(name)] == found


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ToolError, match="finds no CUDA device"):
        _devices("cuda")
