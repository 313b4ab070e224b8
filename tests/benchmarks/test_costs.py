"""Multiply-adds added at run time are what one counts by hand; costs come from config and report."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.costs import MultiplyAdds, costs, multiply_adds, per_feature
from infoquant_vllm.format import InputTransform, ModelShape, parse_config
from tests.common.checkpoints import hf_config, quantization_config, write_random
from tests.common.tiny import write_source

OWN = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 384 * 256) + 512 * 256
"""Per layer q and o, k and v, gate, up and down; then lm_head."""
DOWN = 384 * (12 + 5)  # the Hadamard of 384 is one of 12 and five steps of butterflies
QUERIES_AND_KEYS = (4 + 2) * 64 * 6


def count(quantization: dict[str, Any] | None = None, **changes: Any) -> MultiplyAdds:
    config = hf_config(**changes)
    return multiply_adds(ModelShape.from_hf(config), parse_config(quantization_config(config, **(quantization or {}))))


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (InputTransform(), 0),
        (InputTransform(type="hadamard", block_size=64), 6),
        (InputTransform(type="hadamard", block_size=1536), 12 + 7),
        (InputTransform(type="blocks", block_size=288), 288),
        (InputTransform(type="kronecker", factors=(12, 128)), 140),
    ],
)
def test_a_transform_costs_the_sizes_of_its_matrices_per_feature(transform: InputTransform, expected: int) -> None:
    assert per_feature(transform) == expected


def test_hadamards_of_the_down_input_and_of_queries_and_keys() -> None:
    assert count() == MultiplyAdds(OWN, 2 * (DOWN + QUERIES_AND_KEYS))


def test_rotation_of_a_tied_model_costs_two_products_per_token() -> None:
    assert count(tie_word_embeddings=True).added == 2 * (DOWN + QUERIES_AND_KEYS) + 2 * 256 * 256


def test_linears_that_share_an_input_share_its_transform() -> None:
    four_bits = {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 4}}
    every = {"targets": [f"{name}_proj" for name in "qkvo"] + ["gate_proj", "up_proj", "down_proj"]}
    blocks = {"input_transform": {"type": "blocks", "block_size": 32}}
    found = count({"config_groups": {"all": four_bits | every | blocks}, "kv_cache": None})
    assert found.added == 2 * 32 * (256 + 256 + 256 + 384)  # qkv, o, gate and up, down


def test_unquantized_linears_and_models_add_nothing() -> None:
    assert multiply_adds(ModelShape.from_hf(hf_config()), None) == MultiplyAdds(OWN, 0)
    ignored = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    assert count({"config_groups": {}, "ignore": ignored, "kv_cache": None}).added == 0


def test_costs_come_from_the_report(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "checkpoint")
    found = costs(folder)
    assert (found["bits_per_weight"], found["quantizing_seconds"], found["peak_memory_bytes"]) == (None, None, None)
    report = {"bits_per_weight": 4.05, "seconds": {"calibration": 20.5, "weights": 30.0}, "peak_memory_bytes": 2**31}
    (folder / "infoquant_report.json").write_text(json.dumps(report))
    assert costs(folder) == {
        "bits_per_weight": 4.05,
        "multiply_adds": OWN,
        "multiply_adds_added": 2 * (DOWN + QUERIES_AND_KEYS),
        "quantizing_seconds": 50.5,
        "peak_memory_bytes": 2**31,
    }


def test_an_unquantized_model_has_the_bits_of_its_dtype(tmp_path: Path) -> None:
    found = costs(write_source(tmp_path / "source"))  # float32
    assert (found["bits_per_weight"], found["multiply_adds_added"]) == (32, 0)
