"""An 8-bit lm_head is written, simulated, verified and described; everything else stays as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import offline
from infoquant_vllm.format import (
    BASIS_WEIGHTS,
    INDEX_FILE,
    PROJECTION_TENSOR,
    PROJECTION_WEIGHTS,
    Checkpoint,
    read_json,
    unpack_codes,
)
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from offline.evaluate.inspect import inspect_checkpoint
from offline.evaluate.simulate import load_simulated
from offline.evaluate.verify import verify
from tests.common import oracles
from tests.common.checkpoints import write_random
from tests.common.tiny import VOCAB_SIZE, write_source

HIDDEN = 256
INT16 = InputQuant([], 0, None, 16, True)
SHARD = "model-00001-of-00001.safetensors"
MODELS: list[Any] = [
    pytest.param((True, "hadamard"), id="tied, rotated"),
    pytest.param((True, "none"), id="tied"),
    pytest.param((False, "hadamard"), id="untied, rotated"),
    pytest.param((False, "none"), id="untied"),
]


def quantize(source: Path, output: Path, transform: str, bits: int | None, **options: Any) -> offline.Report:
    site = {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 16}}
    fields = {"name": "test", "transform": transform, "rounding": "rtn", "lm_head_bits": bits, "kv_cache": None}
    recipe = offline.Recipe.model_validate(fields | {"sites": dict.fromkeys(("qkv", "o", "gate_up", "down"), site)})
    return offline.quantize(source, output, recipe=recipe, progress=lambda *_: None, **options)


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A source, and its checkpoints with lm_head as it was and in 8 bits."""
    tied, transform = request.param
    source = write_source(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=tied)
    for bits in (None, 8):
        quantize(source, tmp_path / str(bits), transform, bits)
    return source, tmp_path / "None", tmp_path / "8"


def test_lm_head_becomes_codes_and_all_other_tensors_stay(pair: tuple[Path, Path, Path]) -> None:
    plain, eight = (load_file(folder / SHARD) for folder in pair[1:])
    module = Checkpoint(pair[2]).shape.lm_head_module
    codes, scale = eight.pop(f"{module}.weight_packed"), eight.pop(f"{module}.weight_scale")
    matrix = plain.pop(f"{module}.weight").float()
    assert plain.keys() == eight.keys()
    assert all(torch.equal(plain[name], eight[name]) for name in plain)
    assert scale.shape == (VOCAB_SIZE, 1)
    error = unpack_codes(codes, 8, signed=True) * scale - matrix
    assert (error.norm() / matrix.norm()).item() < 0.02


def test_an_8_bit_lm_head_changes_the_logits_little(pair: tuple[Path, Path, Path]) -> None:
    tokens = torch.randint(3, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(0))
    plain, eight = (load_simulated(folder, torch.float32)(tokens).logits for folder in pair[1:])
    assert 0 < ((eight - plain).norm() / plain.norm()).item() < 0.05


def test_it_passes_verification_and_its_sizes_add_up(pair: tuple[Path, Path, Path]) -> None:
    source, plain, eight = pair
    found = verify(eight, against=source)
    assert found.passed, found.checks
    sizes = [inspect_checkpoint(folder) for folder in (plain, eight)]
    matrix, scales = VOCAB_SIZE * HIDDEN, 4 * VOCAB_SIZE
    assert sizes[0].sizes["embeddings"].bytes - sizes[1].sizes["embeddings"].bytes == matrix - scales
    assert sizes[0].sizes["embeddings"].bf16_bytes == sizes[1].sizes["embeddings"].bf16_bytes
    assert sizes[0].bits_per_weight == sizes[1].bits_per_weight
    assert [found.lm_head_bits for found in sizes] == [None, 8]


def test_the_report_counts_the_bytes_that_are_written(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", dtype=torch.bfloat16)
    dry = quantize(source, tmp_path / "out", "hadamard", 8, dry_run=True)
    real = quantize(source, tmp_path / "out", "hadamard", 8)
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / SHARD).values())
    projection = load_file(tmp_path / "out" / PROJECTION_WEIGHTS)[PROJECTION_TENSOR].nbytes
    basis = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / BASIS_WEIGHTS).values())
    assert dry.total_bytes == real.total_bytes == stored + projection + basis
    assert read_json(tmp_path / "out" / INDEX_FILE)["metadata"]["total_size"] == stored


def test_another_models_8_bit_embeddings_fail_verification(tmp_path: Path) -> None:
    source, other = (write_source(tmp_path / str(seed), seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    quantize(source, tmp_path / "out", "hadamard", 8)
    failed = [check for check in verify(tmp_path / "out", against=other).checks if not check.passed]
    assert [check.name for check in failed] == ["same model"]
    assert "8-bit embeddings are not the source's" in failed[0].detail


def test_an_lm_head_that_uses_few_levels_fails_verification(tmp_path: Path) -> None:
    quantize(write_source(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "out", "hadamard", 8)
    tensors = load_file(tmp_path / "out" / SHARD)
    tensors["model.embed_tokens.weight_packed"] &= 0x11
    save_file(tensors, tmp_path / "out" / SHARD)
    failed = [check for check in verify(tmp_path / "out").checks if not check.passed]
    assert [check.name for check in failed] == ["codes"]
    assert "model.embed_tokens: the codes of 100.0% of its rows" in failed[0].detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tied", "rotated"), [(True, True), (True, False), (False, False)])
def test_simulated_embedding_and_lm_head_equal_the_reference_bit_by_bit(
    tmp_path: Path, tied: bool, rotated: bool, dtype: torch.dtype
) -> None:
    quantization = {"lm_head_bits": 8, "ignore": [], "online_r1": rotated}
    checkpoint = Checkpoint(write_random(tmp_path / "checkpoint", quantization, tie_word_embeddings=tied))
    model, module = load_simulated(checkpoint.folder, dtype), checkpoint.shape.lm_head_module
    packed, scale = (checkpoint.tensor(f"{module}.{name}") for name in ("weight_packed", "weight_scale"))
    ids = torch.tensor([[3, 500, 7]])
    hidden = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows, restored = (unpack_codes(packed, 8, signed=True) * scale)[ids[0]].to(dtype), hidden[0]
    if rotated:
        rotation = checkpoint.tensor("model.embed_tokens.r1")
        rows = oracles.rotate_rows(rows, rotation, None)
        restored = oracles.rotate_rows(restored, rotation.T, checkpoint.tensor("model.embed_tokens.final_norm_weight"))
    expected = oracles.linear(restored, INT16, PackedWeight(packed, scale, None, None), None)
    assert torch.equal(model.lm_head(hidden)[0], expected)
    if tied:
        assert torch.equal(model.model.embed_tokens(ids)[0], rows)
