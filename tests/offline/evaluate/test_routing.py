"""Routers of a quantized mixture are compared with those of its source, and copies of one input with each other."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offline import PRESETS, quantize
from offline.evaluate.inspect import inspect_checkpoint
from offline.evaluate.routing import RecordedRouting
from offline.evaluate.verify import verify
from offline.model.source import Source
from offline.progress import silent
from tests.common.tiny import SIZES, VOCAB_SIZE, write_source

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with a shared expert, rounded to nearest; its source lies beside it."""
    folder = tmp_path_factory.mktemp("routing")
    source = write_source(folder / "source", **SIZES["qwen2-moe"])
    quantize(source, folder / "checkpoint", recipe=PRESETS["rtn"], progress=silent)
    return folder / "checkpoint"


def test_verify_tells_the_share_of_equal_choices_by_layer(checkpoint: Path) -> None:
    found = verify(checkpoint, against=checkpoint.with_name("source"))
    assert found.passed
    assert found.routing_agreement.keys() == {"model.layers.0", "model.layers.1"}
    assert all(0.6 < share < 1 for share in found.routing_agreement.values())
    assert any("of the experts chosen alike" in check.detail for check in found.checks)


@torch.no_grad()
def test_agreement_is_the_share_of_experts_that_both_choose(checkpoint: Path) -> None:
    models = [Source.open(checkpoint.with_name("source")).model(torch.float32) for _ in range(2)]
    tokens = torch.randint(3, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))
    with RecordedRouting(models[0]) as ours, RecordedRouting(models[1]) as theirs:
        for model in models:
            model(tokens)
        assert ours.agreement(theirs) == {0: 1.0, 1: 1.0}
        router = models[0].model.layers[1].mlp.gate  # type: ignore[union-attr]
        router.weight.neg_()
        for model in models:
            model(tokens)
        assert ours.agreement(theirs) == {0: 1.0, 1: 0.0}
        models[0](tokens)
        assert ours.agreement(theirs) == {}  # the other did not run
    models[0](tokens)
    assert ours._chosen == {}


def test_experts_that_clip_their_input_otherwise_are_told(checkpoint: Path, tmp_path: Path) -> None:
    tensors, name = load_file(checkpoint / SHARD), "model.layers.1.mlp.experts.3.up_proj.input_clip_ratio"
    tensors[name] = tensors[name] * 0.5
    for file in checkpoint.iterdir():
        if file.is_file() and file.name != SHARD:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / SHARD)
    failed = [check for check in verify(tmp_path).checks if not check.passed]
    assert [check.name for check in failed] == ["shared inputs"]
    assert name in failed[0].detail


def test_inspection_has_a_scheme_for_all_experts_and_the_size_of_the_routers(checkpoint: Path) -> None:
    found = inspect_checkpoint(checkpoint)
    assert {"experts.gate_proj", "experts.down_proj", "shared_expert.down_proj"} <= found.schemes.keys()
    assert len(found.schemes) == 10
    assert found.sizes["routers"].bytes == 2 * (6 + 1) * 256 * 4
