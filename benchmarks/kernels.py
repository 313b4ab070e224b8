"""Native kernels against what else multiplies, and against reading the weights alone, on one thread.

Contenders take turns, each with weights that the processor's caches have lost since its last turn.
Times are of the thread, so that other work on the machine does not count.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from vllm import _custom_ops

from benchmarks.kernels_rotate import rotate_rows
from benchmarks.provenance import provenance, write_rows
from infoquant_vllm.kernels.native.library import POINTER, SIZE, function, library
from infoquant_vllm.kernels.native.quantized_linear import prepare_grid, prepare_weight, quantized_linear

CACHE_BYTES = 2**28  # of each contender's weights, read in turn
SECONDS = 4.0  # per contender and shape
MIN_ROUNDS, MAX_ROUNDS = 5, 200
LINEAR_SHAPES = ((1, 4096, 4096), (16, 4096, 4096), (256, 4096, 4096))  # tokens, features, channels

Contender = Callable[[int], Any]  # one call, on the weights of this number (counted up)


def main() -> None:
    """Measure, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each contender and shape")
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
        contenders = {
            "int4_linear": _int4_linear(tokens, features, channels, 4, 1),
            "int4_linear A8": _int4_linear(tokens, features, channels, 8, 1),
            "int4_linear groups of 64": _int4_linear(tokens, features, channels, 4, features // 64),
            "reading the packed weights": _read(features * channels // 2),
            "torch int8 (_int_mm)": _torch_int8(tokens, features, channels),
            "vLLM oneDNN int8": _vllm_int8(tokens, features, channels),
            "torch bf16": _torch_bf16(tokens, features, channels),
        }
        if torch.cpu._is_amx_tile_supported():  # where vLLM would use it
            contenders["vLLM W4A8 (int4_scaled_mm_cpu)"] = _vllm_w4a8(tokens, features, channels)
        shape = {"operation": "int4_linear", "tokens": tokens, "features": features, "channels": channels}
        rows += [shape | row for row in take_turns(contenders, seconds)]
    return rows


def input_rows(seconds: float) -> list[dict[str, Any]]:
    """rotate_quantize as a share of the product's time."""
    return rotate_rows(seconds, take_turns, partial(_int4_linear, num_bits=4, groups=1))


OPERATIONS: MappingProxyType[str, Callable[[float], list[dict[str, Any]]]] = MappingProxyType(
    {"int4_linear": linear_rows, "rotate_quantize": input_rows}
)


def take_turns(contenders: dict[str, Contender], seconds: float) -> list[dict[str, Any]]:
    """One row per contender: median, quartiles and minimum of its times, and its time over the first one's."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    count, started = 0, time.monotonic()
    while count < MIN_ROUNDS or (count < MAX_ROUNDS and time.monotonic() - started < seconds * len(contenders)):
        for name, run in contenders.items():
            start = time.thread_time()
            run(count)
            times[name].append((time.thread_time() - start) * 1e6)
        count += 1
    first = next(iter(times.values()))[1:]  # the first round warms up
    return [_row(name, taken[1:], first) for name, taken in times.items()]


def _row(name: str, times: list[float], first: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(times, n=4)
    return {
        "contender": name,
        "median_us": round(median, 1),
        "quartiles_us": [round(low, 1), round(high, 1)],
        "lowest_us": round(min(times), 1),
        "over_first": round(median / statistics.median(first), 3),
        "lowest_over_first": round(min(times) / min(first), 3),
        "rounds": len(times),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    printed = Table(title=f"{rows[0]['kernels']}, one thread, microseconds (median, quartiles, lowest)")
    for heading in ("tokens", "features", "channels", "contender", "median", "quartiles", "lowest", "ratio"):
        printed.add_column(heading)
    for row in rows:
        low, high = row["quartiles_us"]
        numbers = f"{row['median_us']:.0f}", f"{low:.0f} to {high:.0f}", f"{row['lowest_us']:.0f}"
        ratio = f"{row['over_first']:.2f}"
        sizes = (str(row[name]) for name in ("tokens", "features", "channels"))
        printed.add_row(*sizes, row["contender"], *numbers, ratio)
    return printed


def _copies(size: int) -> range:
    return range(-(-CACHE_BYTES // size))


def _int4_linear(tokens: int, features: int, channels: int, num_bits: int, groups: int) -> Contender:
    packed = torch.randint(0, 256, (channels, features // 2), dtype=torch.uint8)
    weight = prepare_weight(packed, 4, True, groups)
    weights, scales = [weight.clone() for _ in _copies(weight.nbytes)], prepare_grid(torch.rand(channels, groups))
    codes = torch.randint(0, 2**num_bits, (tokens, features), dtype=torch.uint8)
    scale, zero = torch.rand(tokens, groups), torch.randint(0, 2**num_bits, (tokens, groups), dtype=torch.int32)
    rest = (scales, None, None, num_bits, torch.bfloat16)
    return lambda i: quantized_linear(codes, scale, zero, weights[i % len(weights)], *rest)


def _read(size: int) -> Contender:
    read, to = function("infoquant_read", POINTER, SIZE, POINTER), torch.empty(64, dtype=torch.uint8)
    data = [torch.randint(0, 256, (size,), dtype=torch.uint8) for _ in _copies(size)]
    return lambda i: read(data[i % len(data)].data_ptr(), size, to.data_ptr())


def _int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _torch_int8(tokens: int, features: int, channels: int) -> Contender:
    x, weights = _int8(tokens, features), [_int8(channels, features) for _ in _copies(channels * features)]
    return lambda i: torch._int_mm(x, weights[i % len(weights)].t())


def _vllm_int8(tokens: int, features: int, channels: int) -> Contender:
    scales, dtype = torch.rand(channels, 1), torch.bfloat16
    handlers = [
        _custom_ops.create_onednn_scaled_mm(_int8(channels, features).t(), scales, dtype, True, False)
        for _ in _copies(channels * features)
    ]
    x, scale, out = _int8(tokens, features), torch.rand(tokens, 1), torch.empty(tokens, channels, dtype=dtype)
    return lambda i: _custom_ops.onednn_scaled_mm(handlers[i % len(handlers)], x, out, scale, None, None, None)


def _torch_bf16(tokens: int, features: int, channels: int) -> Contender:
    size = 2 * channels * features
    weights = [torch.randn(channels, features, dtype=torch.bfloat16) for _ in _copies(size)]
    x = torch.randn(tokens, features, dtype=torch.bfloat16)
    return lambda i: torch.nn.functional.linear(x, weights[i % len(weights)])


def _vllm_w4a8(tokens: int, features: int, channels: int) -> Contender:
    def weight() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = torch.randint(-(2**31), 2**31, (features, channels // 8), dtype=torch.int32)
        zeros = torch.full((features // 128, channels // 8), -2004318072, dtype=torch.int32)  # eight times 8
        scales = torch.rand(features // 128, channels, dtype=torch.bfloat16)
        return _custom_ops.convert_weight_packed_scale_zp(codes, zeros, scales, _custom_ops.CPUQuantAlgo.AWQ)

    weights = [weight() for _ in _copies(channels * features // 2)]
    x = torch.randn(tokens, features, dtype=torch.bfloat16)
    return lambda i: _custom_ops.int4_scaled_mm_cpu(x, *weights[i % len(weights)], None)


if __name__ == "__main__":
    main()
