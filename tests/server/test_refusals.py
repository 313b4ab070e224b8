"""`vllm serve` refuses a bad checkpoint: a message that names what is wrong, a failed exit, nothing left running."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.server import start
from tests.common.checkpoints import hf_config, quantization_config, random_tensors, write_checkpoint

SHARD = "model-00001-of-00001.safetensors"
SCALE = "model.layers.1.mlp.down_proj.weight_scale"
ROTATION = "model.embed_tokens.r1"


@dataclass
class Case:
    """How a sound checkpoint is corrupted, and what the server must say."""

    spoil: Callable[[Path, dict[str, Any], dict[str, torch.Tensor]], None]
    says: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def truncate(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    write_checkpoint(folder, config, tensors)
    shard = folder / SHARD
    shard.write_bytes(shard.read_bytes()[:-1000])


def without(name: str) -> Callable[[Path, dict[str, Any], dict[str, torch.Tensor]], None]:
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


def sound(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    write_checkpoint(folder, config, tensors)


CASES = {
    "truncated shard": Case(truncate, (SHARD, "not a whole safetensors file")),
    "missing tensor": Case(without(SCALE), (SCALE, "missing")),
    "missing rotation": Case(without(ROTATION), (ROTATION, "missing")),
    "unknown format version": Case(from_the_future, ("format_version is 99", "reads 3")),
    "NaN scale": Case(not_a_number, (SCALE, "nan", "scales above 0")),
    "unquantized model": Case(unquantized, ("infoquant quantize",), ("--quantization", "infoquant")),
    "tensor parallelism through a scale": Case(
        sound,
        ("o_proj", "256", "128", "--max-tp-size 2"),
        ("--tensor-parallel-size", "2"),
        (("VLLM_CPU_OMP_THREADS_BIND", "0|1"),),  # vLLM shares out NUMA nodes by itself, but not the cores of one
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_checkpoint_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    for variable, value in case.environment:
        monkeypatch.setenv(variable, value)
    config = hf_config(tie_word_embeddings=True)
    config["quantization_config"] = quantization_config(config)
    folder = tmp_path / "checkpoint"
    case.spoil(folder, config, random_tensors(config))
    server = start(folder, tmp_path / "server.log", "--enforce-eager", "--skip-tokenizer-init", *case.arguments)
    try:
        code = server.process.wait(timeout=240)
        gone = server.gone_within(20)
    finally:
        server.stop()
    log = server.log.read_text(errors="replace")
    assert code != 0
    assert gone
    for words in case.says:
        assert words in log, f"{words!r} is not in:\n{log[-3000:]}"
