"""vLLM refuses a bad checkpoint with a message that names what is wrong; see server/test_refusals.py."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common.checkpoints import hf_config, quantization_config, random_tensors, write_checkpoint
from tests.common.engine import Engine, EngineError

SHARD = "model-00001-of-00001.safetensors"
SCALE = "model.layers.1.mlp.down_proj.weight_scale"
ROTATION = "model.embed_tokens.r1"
Spoil = Callable[[Path, dict[str, Any], dict[str, torch.Tensor]], None]


@dataclass
class Case:
    """How a sound checkpoint is corrupted, and what vLLM must say."""

    spoil: Spoil
    says: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def truncate(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    write_checkpoint(folder, config, tensors)
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1000])


def without(name: str) -> Spoil:
    def spoil(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]
        write_checkpoint(folder, config, tensors)

    return spoil


def from_the_future(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["quantization_config"]["format_version"] = 99
    write_checkpoint(folder, config, tensors)


def not_a_number(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[SCALE][7] = float("nan")
    write_checkpoint(folder, config, tensors)


def unquantized(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del config["quantization_config"]
    write_checkpoint(folder, config, tensors)


CASES = {
    "truncated shard": Case(truncate, (SHARD, "not a whole safetensors file")),
    "missing tensor": Case(without(SCALE), (SCALE, "missing")),
    "missing rotation": Case(without(ROTATION), (ROTATION, "missing")),
    "unknown format version": Case(from_the_future, ("format_version is 99", "reads 3")),
    "NaN scale": Case(not_a_number, (SCALE, "nan", "scales above 0")),
    "unquantized model": Case(unquantized, ("infoquant quantize",), {"quantization": "infoquant"}),
}


def write_spoiled(folder: Path, spoil: Spoil) -> Path:
    config = hf_config(tie_word_embeddings=True)
    config["quantization_config"] = quantization_config(config)
    spoil(folder, config, random_tensors(config))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_bad_checkpoint_is_refused(engine: Engine, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    with pytest.raises(EngineError) as refused:
        engine.run(write_spoiled(tmp_path / "checkpoint", case.spoil), [[3, 4]], **case.options)
    for words in case.says:
        assert words in str(refused.value)
