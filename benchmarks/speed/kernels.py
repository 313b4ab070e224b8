"""Time the compiled CPU kernels against other GEMMs, and against reading the weights, interleaved on one thread."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.interleaved import SECONDS, Candidate, table, time_interleaved
from benchmarks.common.provenance import provenance, write_rows
from benchmarks.speed import gemms
from infoquant_vllm.kernels.cpu.kernels import prepare_matrices
from infoquant_vllm.kernels.cpu.library import library, operations
from infoquant_vllm.kernels.operands import InputQuant
from infoquant_vllm.kernels.torch import quantize as plain

LINEAR_SHAPES = ((1, 4096, 4096), (16, 4096, 4096), (256, 4096, 4096))  # tokens, features, channels
ROTATE_TOKENS = (1, 256)
ROTATE_CASES = (  # features, channels of the linear, size of a Hadamard, shapes of learned matrices, groups
    ("no transform", 4096, 4096, 0, (), 1),
    ("no transform, groups of 64", 4096, 4096, 0, (), 64),
    ("Hadamard 4096", 4096, 4096, 4096, (), 1),
    ("Kronecker 64 x 64", 4096, 4096, 0, ((64, 64), (64, 64)), 1),
    ("Hadamard 28 x 512", 14336, 4096, 14336, (), 1),
    ("Hadamard 12 x 128", 1536, 576, 1536, (), 1),
    ("Kronecker 12 x 128", 1536, 576, 0, ((12, 12), (128, 128)), 1),
    ("2 blocks of 288", 576, 3072, 0, ((2, 288, 288),), 1),
    ("9 blocks of 64", 576, 576, 0, ((9, 64, 64),), 9),
)


def main() -> None:
    """Measure, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.kernels", description=__doc__)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each candidate and shape")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and inputs")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    common = {"kernels": f"native {library().target}", "threads": 1, **provenance(options.seed)}
    rows = [row | common for operation in options.operations for row in OPERATIONS[operation](options.seconds)]
    Console().print(table(rows))
    if options.json:
        write_rows(rows, options.json)


def linear_rows(seconds: float) -> list[dict[str, Any]]:
    """Time int4_linear, W4A4 per token unless its name says otherwise, against GEMMs of other widths."""
    rows = []
    for shape in LINEAR_SHAPES:
        tokens, features, channels = shape
        candidates = {
            "int4_linear": gemms.int4_linear(*shape, num_bits=4, groups=1),
            "int4_linear A8": gemms.int4_linear(*shape, num_bits=8, groups=1),
            "int4_linear groups of 64": gemms.int4_linear(*shape, num_bits=4, groups=features // 64),
            "reading the packed weights": gemms.read_weights(features * channels // 2),
            "torch int8 (_int_mm)": gemms.torch_int8(*shape),
            "vLLM oneDNN int8": gemms.vllm_int8(*shape),
            "vLLM oneDNN bf16": gemms.vllm_bf16(*shape),
            "torch bf16": gemms.torch_bf16(*shape),
        }
        if torch.cpu._is_amx_tile_supported():  # vLLM uses it on such CPUs only
            candidates["vLLM W4A8 (int4_scaled_mm_cpu)"] = gemms.vllm_w4a8(*shape)
        facts = {"operation": "int4_linear", "tokens": tokens, "features": features, "channels": channels}
        rows += [facts | row for row in time_interleaved(candidates, seconds)]
    return rows


def rotate_rows(seconds: float) -> list[dict[str, Any]]:
    """Time rotate_quantize to 4 bits, compiled and in torch, as shares of the time of the linear that follows."""
    rows = []
    for tokens in ROTATE_TOKENS:
        for name, features, channels, hadamard, shapes, groups in ROTATE_CASES:
            x, matrices = torch.randn(tokens, features).bfloat16(), [torch.randn(shape) for shape in shapes]
            inputs = InputQuant(matrices, hadamard, torch.ones(groups, 2), 4, False)
            prepared = inputs._replace(matrices=prepare_matrices(matrices, hadamard))
            candidates = {
                "int4_linear": gemms.int4_linear(tokens, features, channels, num_bits=4, groups=1),
                name: _ignoring_copy(partial(operations().rotate_quantize, x, *prepared)),
                f"{name} (torch)": _ignoring_copy(partial(plain.rotate_quantize, x, inputs)),
            }
            facts = {"operation": "rotate_quantize", "tokens": tokens, "features": features, "channels": channels}
            rows += [facts | row for row in time_interleaved(candidates, seconds)]
    return rows


def _ignoring_copy(call: Callable[[], Any]) -> Candidate:
    """Make a candidate of a call that has no weights to take in turn."""
    return lambda _: call()


OPERATIONS: MappingProxyType[str, Callable[[float], list[dict[str, Any]]]] = MappingProxyType(
    {"int4_linear": linear_rows, "rotate_quantize": rotate_rows}
)


if __name__ == "__main__":
    main()
