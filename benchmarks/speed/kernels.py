"""Native kernels against what else multiplies, and against reading the weights alone, on one thread, in turns."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console

from benchmarks.common.interleaved import SECONDS, table, time_interleaved
from benchmarks.common.provenance import provenance, write_rows
from benchmarks.speed.kernels_rotate import rotate_rows
from benchmarks.speed.products import int4_linear, read_weights, torch_bf16, torch_int8, vllm_bf16, vllm_int8, vllm_w4a8
from infoquant_vllm.kernels.cpu.library import library

LINEAR_SHAPES = ((1, 4096, 4096), (16, 4096, 4096), (256, 4096, 4096))  # tokens, features, channels


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
    """int4_linear, W4A4 per token unless its name says otherwise, against products of other widths."""
    rows = []
    for tokens, features, channels in LINEAR_SHAPES:
        candidates = {
            "int4_linear": int4_linear(tokens, features, channels, 4, 1),
            "int4_linear A8": int4_linear(tokens, features, channels, 8, 1),
            "int4_linear groups of 64": int4_linear(tokens, features, channels, 4, features // 64),
            "reading the packed weights": read_weights(features * channels // 2),
            "torch int8 (_int_mm)": torch_int8(tokens, features, channels),
            "vLLM oneDNN int8": vllm_int8(tokens, features, channels),
            "vLLM oneDNN bf16": vllm_bf16(tokens, features, channels),
            "torch bf16": torch_bf16(tokens, features, channels),
        }
        if torch.cpu._is_amx_tile_supported():  # where vLLM would use it
            candidates["vLLM W4A8 (int4_scaled_mm_cpu)"] = vllm_w4a8(tokens, features, channels)
        shape = {"operation": "int4_linear", "tokens": tokens, "features": features, "channels": channels}
        rows += [shape | row for row in time_interleaved(candidates, seconds)]
    return rows


OPERATIONS: MappingProxyType[str, Callable[[float], list[dict[str, Any]]]] = MappingProxyType(
    {"int4_linear": linear_rows, "rotate_quantize": rotate_rows}
)


if __name__ == "__main__":
    main()
