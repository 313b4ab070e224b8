"""`verify` passes what `quantize` writes and reports corruption by check, layer and value."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import offline
from infoquant_vllm.format import BASIS_FOLDER, Checkpoint
from offline.evaluate.compare_to_source import Comparison
from offline.evaluate.inspect import inspect_checkpoint
from offline.evaluate.verify import Verification, verify
from offline.recipe import CalibrationSize
from tests.common.tiny import write_source

SHARD = "model-00001-of-00001.safetensors"
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("verify") / "source", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    folder = source.with_name("quantized")
    recipe = offline.Recipe(name="hadamard-rtn", transform="hadamard", rounding="rtn")
    offline.quantize(source, folder, recipe=recipe, progress=lambda *_: None)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def spoil(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / SHARD)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / SHARD)


def failure(found: Verification) -> tuple[str, str]:
    """Return name and detail of the only check that failed."""
    failed = [check for check in found.checks if not check.passed]
    assert len(failed) == 1
    assert not found.passed
    return failed[0].name, failed[0].detail


def test_whole_checkpoint_passes_every_check(whole: Path, source: Path) -> None:
    found = verify(whole, against=source)
    assert found.passed
    assert [check.name for check in found.checks] == [
        "headers", "values", "codes", "rotations", "shared inputs", "same model", "hidden states", "behavior",
        "adapters",
    ]  # fmt: skip
    assert list(found.layer_errors) == ["model.layers.0", "model.layers.1"]
    assert all(0 < error < 0.5 for error in found.layer_errors.values())


@pytest.mark.parametrize("zero", [[], ["model.embed_tokens.weight"], ["model.embed_tokens.weight", "lm_head.weight"]])
def test_untied_model_is_recognized_in_its_rotated_basis(tmp_path: Path, zero: list[str]) -> None:
    """Also if one channel of the residual stream is not used."""
    source = write_source(tmp_path / "source", tie_word_embeddings=False, hidden_size=128, head_dim=32)
    tensors = load_file(source / "model.safetensors")
    for name in zero:
        tensors[name][:, 7] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = offline.Recipe(name="hadamard-rtn", transform="hadamard", rounding="rtn")
    offline.quantize(source, tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    found = verify(tmp_path / "out", against=source)
    assert found.passed
    assert "in another basis" in found.checks[5].detail


def test_a_basis_of_adapters_that_is_not_the_checkpoints_fails(folder: Path, source: Path, tmp_path: Path) -> None:
    assert re.match(r"basis [0-9a-f]{16}, \|Q", verify(folder).checks[-1].detail)
    recipe = offline.Recipe(name="hadamard-rtn", transform="hadamard", rounding="rtn")
    offline.quantize(source, tmp_path / "other", recipe=recipe, seed=5, progress=lambda *_: None)
    shutil.copytree(tmp_path / "other" / BASIS_FOLDER, folder / BASIS_FOLDER, dirs_exist_ok=True)
    check, detail = failure(verify(folder))
    assert check == "adapters"
    assert "its fingerprint is" in detail
    shutil.rmtree(folder / BASIS_FOLDER)
    assert verify(folder).checks[-1].detail == "no adapter_basis/config.json, so LoRA adapters cannot be served"


@pytest.fixture(scope="module")
def trained_head(source: Path) -> Path:
    """Write a model that its config calls tied, with a separate lm_head, as fine-tuning leaves it."""
    folder = Path(shutil.copytree(source, source.with_name("trained-head")))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_trained_head_of_a_tied_config_is_quantized_as_the_source_serves_it(
    trained_head: Path, tmp_path: Path, transform: str
) -> None:
    recipe = offline.Recipe(name="rtn", transform=transform, rounding="rtn")
    offline.quantize(trained_head, tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    found = verify(tmp_path / "out", against=trained_head)
    assert found.passed, found
    assert "lm_head is the source's" in found.checks[5].detail


def test_dropped_lm_head_fails_however_the_source_is_read(
    trained_head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline.model.source._is_tied", lambda _: True)
    recipe = offline.Recipe(name="rtn", transform="none", rounding="rtn")
    offline.quantize(trained_head, tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    check, detail = failure(verify(tmp_path / "out", against=trained_head))
    assert check == "same model"
    assert "lm_head is tied to the embeddings" in detail


@pytest.mark.parametrize("bits", [None, 8])
def test_head_of_another_model_fails(tmp_path: Path, bits: int | None) -> None:
    sources = [write_source(tmp_path / f"{seed}", seed=seed, tie_word_embeddings=False) for seed in (0, 1)]
    tensors, other = (load_file(source / "model.safetensors") for source in sources)
    recipe = offline.Recipe(name="hadamard-rtn", transform="hadamard", rounding="rtn", lm_head_bits=bits)
    offline.quantize(sources[0], tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    assert verify(tmp_path / "out", against=sources[0]).passed
    tensors["lm_head.weight"] = other["lm_head.weight"]
    save_file(tensors, sources[0] / "model.safetensors", metadata={"format": "pt"})
    check, detail = failure(verify(tmp_path / "out", against=sources[0]))
    assert check == "same model"
    assert "lm_head is not the source's" in detail


def test_scale_of_nan_fails_with_its_place(folder: Path) -> None:
    name = f"{LAYER}.mlp.down_proj.weight_scale"
    spoil(folder, name, lambda t: t.index_fill(0, torch.tensor([3]), float("nan")))
    check, detail = failure(verify(folder))
    assert check == "values"
    assert f"{name}[3, 0] is nan" in detail


def test_missing_shard_fails(folder: Path) -> None:
    (folder / SHARD).unlink()
    check, detail = failure(verify(folder))
    assert check == "headers"
    assert SHARD in detail


LOST: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "rows of zeros": (lambda t: t.index_fill(0, torch.arange(64), 0), "25.0%"),
    "low bits alone": (lambda t: t & 0x11, "100.0%"),
}


@pytest.mark.parametrize("lost", LOST)
def test_codes_too_small_for_their_scales_fail_with_the_linear(folder: Path, lost: str) -> None:
    change, share = LOST[lost]
    spoil(folder, f"{LAYER}.self_attn.q_proj.weight_packed", change)
    check, detail = failure(verify(folder))
    assert check == "codes"
    assert f"{LAYER}.self_attn.q_proj: the codes of {share} of its rows" in detail


def zero_padded(name: str, weight: torch.Tensor) -> None:
    if "gate_proj" in name or "up_proj" in name:
        weight[256:] = 0
    if "down_proj" in name:
        weight[:, 256:] = 0


def pruned(name: str, weight: torch.Tensor) -> None:
    if "layers.1" in name and ("o_proj" in name or "down_proj" in name):
        weight.zero_()


def identity(name: str, weight: torch.Tensor) -> None:
    if "layers.1.self_attn.o_proj" in name:
        weight.copy_(torch.eye(256))


def massive(name: str, weight: torch.Tensor) -> None:
    """Let one neuron write almost all of its layer's output, into one channel."""
    if "layers.0.mlp.down_proj" in name:
        weight *= 0.01
        weight[5, 7] = 300.0


def headless(name: str, weight: torch.Tensor) -> None:
    if "k_proj" in name or "v_proj" in name:
        weight[:64] = 0


@pytest.mark.parametrize("preset", ["rtn", "quarot", "best"])
@pytest.mark.parametrize("change", [zero_padded, pruned, identity, massive, headless])
def test_oddities_of_the_source_are_no_fault(
    preset: str, change: Callable[[str, torch.Tensor], None], tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        change(name, tensor)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = offline.PRESETS[preset].model_copy(
        update={"calibration": CalibrationSize(sequences=4, sequence_length=64), "psot": None, "distillation": None}
    )
    if recipe.transform == "psot-shared":
        recipe = recipe.model_copy(update={"transform": "hadamard"})
    offline.quantize(source, tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    assert [check.detail for check in verify(tmp_path / "out").checks if not check.passed] == []


def test_matrix_that_is_not_orthogonal_fails_with_its_error(folder: Path) -> None:
    spoil(folder, "model.embed_tokens.r1", lambda t: t * 1.01)
    check, detail = failure(verify(folder))
    assert check == "rotations"
    assert "r1: |Q^T Q - I| is 0.02" in detail


@pytest.mark.parametrize("linear", ["self_attn.v_proj", "mlp.up_proj"])
def test_clips_that_differ_for_one_input_fail(folder: Path, linear: str) -> None:
    spoil(folder, f"{LAYER}.{linear}.input_clip_ratio", lambda t: t - 0.1)
    check, detail = failure(verify(folder))
    assert check == "shared inputs"
    assert f"{LAYER}.{linear}.input_clip_ratio: differs from" in detail


def test_schemes_that_differ_for_one_input_fail(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    groups: dict[str, Any] = config["quantization_config"]["config_groups"]
    name, group = next((n, g) for n, g in groups.items() if any("k_proj" in target for target in g["targets"]))
    target = next(target for target in group["targets"] if "k_proj" in target)
    group["targets"].remove(target)
    groups["other"] = group | {"targets": [target], "input_activations": {"num_bits": 8}}
    assert name != "other"
    (folder / "config.json").write_text(json.dumps(config))
    check, detail = failure(verify(folder))
    assert check == "shared inputs"
    assert "model.layers.0.self_attn.k_proj: its input is quantized differently" in detail


def test_another_model_fails(whole: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", seed=1, dtype=torch.bfloat16)
    check, detail = failure(verify(whole, against=other))
    assert check == "same model"
    assert "embeddings are not a rotation of the source's" in detail


def test_model_of_another_size_fails(whole: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", intermediate_size=384)
    assert failure(verify(whole, against=other))[0] == "same model"


def test_corrupted_layer_shows_in_its_error(folder: Path, source: Path, whole: Path) -> None:
    spoil(folder, f"{LAYER}.mlp.down_proj.weight_packed", lambda t: t.flip(0))
    errors = []
    for checkpoint in (whole, folder):
        layer_errors: dict[str, float] = {}
        comparison = Comparison(Checkpoint(checkpoint), source)
        comparison.same_vocabulary()
        comparison.behavior(layer_errors, {})
        errors.append(layer_errors)
    assert errors[1]["model.layers.0"] == errors[0]["model.layers.0"]
    assert errors[1][LAYER] > 1.5 * errors[0][LAYER]


def test_inspection_adds_up(whole: Path) -> None:
    found = inspect_checkpoint(whole)
    stored = sum(tensor.nbytes for tensor in load_file(whole / SHARD).values())
    assert found.sizes["total"].bytes == stored
    assert sum(size.bytes for part, size in found.sizes.items() if part != "total") == stored
    assert 4 < found.bits_per_weight < 4.5
    assert (found.kv_bytes_per_token, found.kv_bf16_bytes_per_token) == (2 * 2 * 72, 2 * 2 * 256)
    assert found.recipe is not None
    assert found.recipe["name"] == "hadamard-rtn"
    assert found.schemes["mlp.down_proj"] is not None
    assert found.schemes["mlp.down_proj"].input_transform.type == "hadamard"
