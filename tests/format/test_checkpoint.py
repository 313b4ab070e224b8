"""A checkpoint folder that is not whole, or whose values cannot be right, is refused by file and tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infoquant_vllm.format import INDEX_FILE, Checkpoint, FormatError, check_values
from tests.common.checkpoints import hf_config, quantization_config, write_random

SHARD = "model-00001-of-00001.safetensors"
SCALE = "model.layers.1.mlp.down_proj.weight_scale"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random(tmp_path / "checkpoint")


def edit(folder: Path, changes: dict[str, torch.Tensor | None], index: bool = True) -> None:
    """Replace, add or (None) drop tensors of the shard and, with `index`, of the index."""
    tensors: dict[str, Any] = load_file(folder / SHARD) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / SHARD)
    if index:
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SHARD)}))


def test_whole_checkpoint_opens_and_reads(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.tensor(SCALE).shape == (256, 1)


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / SHARD).unlink()
    with pytest.raises(FormatError, match=f"{SHARD}: the shard is missing"):
        Checkpoint(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_shard_is_named(folder: Path, kept: float) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: int(kept if kept >= 1 else kept * len(data))])
    with pytest.raises(FormatError, match=f"{SHARD}: not a whole safetensors file"):
        Checkpoint(folder)


def test_missing_tensor_is_named(folder: Path) -> None:
    edit(folder, {SCALE: None})
    with pytest.raises(FormatError, match=rf"{SCALE} \[256, 1\] is missing"):
        Checkpoint(folder)


def test_tensor_that_the_index_does_not_list_is_named(folder: Path) -> None:
    edit(folder, {"model.extra": torch.zeros(1)}, index=False)
    with pytest.raises(FormatError, match=r"holds model\.extra, which .* does not place there"):
        Checkpoint(folder)


def test_unexpected_tensor_is_named(folder: Path) -> None:
    edit(folder, {"model.extra": torch.zeros(1)})
    with pytest.raises(FormatError, match=r"unexpected tensor model\.extra"):
        Checkpoint(folder)


def test_tensor_that_only_the_index_knows_is_named(folder: Path) -> None:
    file = folder / INDEX_FILE
    index = json.loads(file.read_text())
    index["weight_map"][""] = SHARD
    file.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=rf"{SHARD}: {INDEX_FILE} places '' there, which it does not hold"):
        Checkpoint(folder)


def test_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    edit(folder, {SCALE: torch.ones(128, 1)})
    with pytest.raises(FormatError, match=rf"{SCALE} has shape \[128, 1\], expected \[256, 1\]"):
        Checkpoint(folder)


def test_wrong_dtype_is_named(folder: Path) -> None:
    edit(folder, {SCALE: torch.ones(256, 1, dtype=torch.float16)})
    with pytest.raises(FormatError, match=f"{SCALE} is F16, expected F32"):
        Checkpoint(folder)


def test_promised_rotation_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "tied", tie_word_embeddings=True)
    edit(folder, {"model.embed_tokens.r1": None})
    with pytest.raises(FormatError, match=r"model\.embed_tokens\.r1 \[256, 256\] is missing"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale"])
def test_8_bit_vocabulary_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    quantization = {"lm_head_bits": 8, "ignore": []}
    folder = write_random(tmp_path / "tied", quantization, tie_word_embeddings=True)
    edit(folder, {f"model.embed_tokens.{name}": None})
    with pytest.raises(FormatError, match=rf"model\.embed_tokens\.{name} \[512, \d+\] is missing"):
        Checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scale_that_no_quantizer_writes_is_named_with_its_place(folder: Path, value: float) -> None:
    scale = torch.ones(256, 1)
    scale[17] = value
    edit(folder, {SCALE: scale})
    with pytest.raises(
        FormatError, match=rf"{SHARD}: {SCALE}\[17, 0\] is {value:g}, expected scales above 0 \(1 of 256"
    ):
        Checkpoint(folder).tensor(SCALE)


@pytest.mark.parametrize(
    ("symmetric", "multiplier", "zero", "largest"),
    [
        (True, 0, 0, 15),
        (True, 16, 0, 15),
        (False, 16, 7, 15),
        (False, 9, 15, 8),
        (False, 15, 6, 14),
        (False, 255, 0, 8),
    ],
)
def test_multiplier_that_makes_no_int8_values_is_named_with_its_place(
    tmp_path: Path, symmetric: bool, multiplier: int, zero: int, largest: int
) -> None:
    weights = {"num_bits": 4, "symmetric": symmetric, "strategy": "group", "group_size": 64}
    groups = quantization_config(hf_config())["config_groups"]
    changes = {"config_groups": groups | {"down": groups["down"] | {"weights": weights}}}
    folder, name = write_random(tmp_path / "groups", changes), "model.layers.1.mlp.down_proj.weight_multiplier"
    tensors = load_file(folder / SHARD)
    zero_point = name.replace("multiplier", "zero_point")
    Checkpoint(folder).tensor(name)
    tensors[name][5, 2] = largest
    if not symmetric:
        tensors[zero_point][5, 2] = zero
    save_file(tensors, folder / SHARD)
    Checkpoint(folder).tensor(name)
    tensors[name][5, 2] = multiplier
    save_file(tensors, folder / SHARD)
    message = rf"{SHARD}: {name}\[5, 2\] is {multiplier}, expected 1 .. {largest}, .*1 of 1536 are wrong"
    with pytest.raises(FormatError, match=message):
        Checkpoint(folder).tensor(name)


@pytest.mark.parametrize("value", [0.0, 1.5, float("nan")])
def test_clip_out_of_range_is_named(folder: Path, value: float) -> None:
    name = "model.layers.0.self_attn.attn.key_clip_ratio"
    edit(folder, {name: torch.full((2, 2), value)})
    with pytest.raises(FormatError, match=rf"{name}\[0, 0\] is {value:g}, expected factors in"):
        Checkpoint(folder).tensor(name)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_config_that_is_no_json_object_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(FormatError, match=r"config\.json: "):
        Checkpoint(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "model.bin", 7])
def test_index_that_points_elsewhere_is_refused(folder: Path, shard: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {SCALE: shard}}))
    with pytest.raises(FormatError, match="which is no safetensors file name"):
        Checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_values_pass_whatever_their_sum_and_others_are_named(dtype: torch.dtype) -> None:
    values = torch.full((7, 33), torch.finfo(dtype).max, dtype=dtype)
    check_values(values, "weight", "file")
    check_values(values * torch.tensor([1, -1, 1, -1, 1, -1, 1], dtype=dtype)[:, None], "weight", "file")
    values[2, 5], values[6, 32] = float("inf"), -float("inf")
    with pytest.raises(FormatError, match=r"weight\[2, 5\] is inf, expected finite numbers \(2 of 231 are wrong\)"):
        check_values(values, "weight", "file")


CACHE = "model.layers.1.self_attn.attn"
PLAIN = {
    "config_groups": {},
    "ignore": [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")] + ["lm_head"],
    "kv_cache": {"key_bits": 4, "value_bits": 4, "key_transform": "hadamard", "key_mean": True, "key_feedback": True},
    "rotated_hidden_states": False,
    "online_r1": False,
}
"""A quantized cache, and unquantized linears."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{CACHE}.key_clip_ratio": None}, rf"{CACHE}.key_clip_ratio \[2, 2\] is missing"),
        ({f"{CACHE}.value_clip_ratio": torch.ones(3, 2)}, r"value_clip_ratio has shape \[3, 2\], expected \[2, 2\]"),
        ({f"{CACHE}.key_feedback": torch.ones(2, 64)}, r"key_feedback has shape \[2, 64\], expected \[2, 64, 64\]"),
        ({"model.layers.0.mlp.up_proj.weight": None}, r"up_proj.weight \[384, 256\] is missing"),
        ({"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(1)}, "unexpected tensor .*up_proj.weight_packed"),
    ],
)
def test_a_broken_cache_beside_unquantized_linears_is_refused_by_tensor(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = write_random(tmp_path / "checkpoint", PLAIN)
    Checkpoint(folder)
    edit(folder, changes)
    with pytest.raises(FormatError, match=message):
        Checkpoint(folder)
