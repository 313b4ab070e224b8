"""The Triton kernels on this GPU: held against the CPU's reference first, then timed.

A row is one kernel in one shape: its error against the reference, microseconds, and the share of the bytes that it has
to read and write, in GB/s. On a CPU (--device cpu, TRITON_INTERPRET=1) the errors alone.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.provenance import provenance, write_rows
from infoquant_vllm.format import cell_bytes
from infoquant_vllm.kernels.cpu import kv_cache as expected
from infoquant_vllm.kernels.reference import linear as expected_linear
from infoquant_vllm.kernels.triton import kv4_attention, kv4_store
from infoquant_vllm.kernels.triton import linear as triton_linear
from infoquant_vllm.kernels.triton.int4_linear import int4_linear
from infoquant_vllm.kernels.triton.rotate_quantize import rotate_quantize
from infoquant_vllm.kernels.triton.weights import layout

BITS = (4, 4)
BLOCK = 16
TOLERANCE = 0.01  # of the greatest output: outputs are bf16


@dataclass(frozen=True)
class Case:
    """`sequences` of `context` tokens, of which the last `queries` ask."""

    heads: int
    kv_heads: int
    size: int
    sequences: int
    context: int
    queries: int


CASES = [
    Case(heads, kv_heads, 128, sequences, context, queries)
    for heads, kv_heads in ((32, 8), (40, 40), (28, 4))
    for sequences, context, queries in ((1, 16384, 1), (16, 4096, 1), (1, 2048, 2048), (2, 4096, 512))
]
SMALL = [Case(4, 2, 64, 2, 40, 1), Case(4, 2, 64, 2, 40, 7)]


@dataclass(frozen=True)
class Product:
    """A W4A4 linear whose input is quantised in so many groups, through a Hadamard of `hadamard` or (0) none."""

    tokens: int
    features: int
    channels: int
    groups: int
    hadamard: int


PRODUCTS = [
    Product(tokens, *sizes)
    for sizes in ((4096, 6144, 1, 0), (4096, 4096, 32, 0), (4096, 28672, 1, 0), (14336, 4096, 1, 14336))
    for tokens in (1, 16, 256, 2048)
]
SMALL_PRODUCTS = [Product(5, 128, 48, 2, 0), Product(40, 192, 32, 1, 192)]


def main() -> None:
    """Check, measure, print rows and write --json; raises SystemExit where a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    small = options.device == "cpu"
    rows = [row for case in (SMALL if small else CASES) for row in measure(case, options.device)]
    rows += [row for case in (SMALL_PRODUCTS if small else PRODUCTS) for row in measure_product(case, options.device)]
    for row in rows:
        Console().print(row)
    if options.json:
        write_rows(rows, options.json)
    wrong = [row["kernel"] for row in rows if not row["right"]]
    if wrong:
        raise SystemExit(f"wrong results of {', '.join(wrong)}; the rows say where")


def measure(case: Case, device: str) -> list[dict[str, Any]]:
    """Rows of `kv4_store` and `kv4_attention`."""
    torch.manual_seed(0)
    tokens = case.sequences * case.context
    key, value = torch.randn(2, tokens, case.kv_heads, case.size).bfloat16()
    query = torch.randn(case.sequences * case.queries, case.heads, case.size).bfloat16()
    used = -(-case.context // BLOCK)
    table = torch.randperm(case.sequences * used).int().view(case.sequences, used)
    places = torch.arange(case.context)
    slots = (table[:, places // BLOCK].long() * BLOCK + places % BLOCK).flatten()
    starts = torch.arange(case.sequences + 1, dtype=torch.int32) * case.queries
    lens = torch.full((case.sequences,), case.context, dtype=torch.int32)
    cells = torch.zeros(table.numel(), case.kv_heads, BLOCK, cell_bytes(case.size, BITS), dtype=torch.uint8)
    clip = torch.ones(case.kv_heads, 2)

    store: list[Any] = [key, value, cells, slots, clip, clip, None, True, BITS]
    there: list[Any] = [each.to(device, copy=True) if isinstance(each, torch.Tensor) else each for each in store]
    expected.kv_store(*store)
    kv4_store.kv_store(*there)
    stored = (there[2].cpu() != cells).float().mean().item()

    out, scale = torch.empty_like(query), case.size**-0.5
    batch: list[Any] = [query, cells, starts, lens, table, True, scale, None, BITS, out]
    on_device: list[Any] = [each.to(device, copy=True) if isinstance(each, torch.Tensor) else each for each in batch]
    found = on_device[-1]
    expected.kv_attention(*batch)
    kv4_attention.kv_attention(*on_device)
    error = ((found.cpu().float() - out.float()).abs().max() / out.float().abs().max()).item()

    bytes_stored, bytes_read = 2 * key.nbytes + cells.nbytes, cells.nbytes + 2 * query.nbytes
    return [
        _row("kv4_store", case, stored, stored == 0, bytes_stored, lambda: kv4_store.kv_store(*there)),
        _row(
            "kv4_attention",
            case,
            error,
            error <= TOLERANCE,
            bytes_read,
            lambda: kv4_attention.kv_attention(*on_device),
        ),
    ]


def measure_product(case: Product, device: str) -> list[dict[str, Any]]:
    """Rows of `rotate_quantize` and `int4_linear`, which are right where a layer's output is."""
    torch.manual_seed(0)
    x, clip = torch.randn(case.tokens, case.features).bfloat16(), torch.full((case.groups, 2), 0.9)
    packed = torch.randint(0, 256, (case.channels, case.features // 2), dtype=torch.uint8)
    scale = torch.rand(case.channels, 1)
    checked = slice(0, 64)  # of the tokens: the reference takes its time
    plain: Any = (x[checked], [], case.hadamard, clip, 4, False, packed, scale, None, None)
    out = expected_linear.linear(*plain).float()

    x, clip = x.to(device), clip.to(device)
    matrices = [matrix.to(device) for matrix in triton_linear.prepare_matrices([], case.hadamard)]
    weight = triton_linear.prepare_weight(packed, 4, True, case.groups).to(device)
    grid = triton_linear.prepare_grid(scale).to(device)
    found = triton_linear.linear(x, matrices, case.hadamard, clip, 4, False, weight, grid, None, None)
    error = ((found[checked].cpu().float() - out).abs().max() / out.abs().max()).item()

    padded = layout(case.features, case.groups, 4).padded

    def quantise() -> Any:
        return rotate_quantize(x, matrices, case.hadamard, clip, 4, False, padded, 0)

    codes = quantise()
    product = lambda: int4_linear(codes, case.features, weight, grid, None, None, x.dtype)  # noqa: E731
    right, quantised = error <= TOLERANCE, x.nbytes + codes.values.nbytes
    return [
        _row("rotate_quantize", case, error, right, quantised, quantise),
        _row("int4_linear", case, error, right, weight.nbytes + codes.values.nbytes + found.nbytes, product),
    ]


def _row(
    name: str, case: Case | Product, error: float, right: bool, moved: int, call: Callable[[], Any]
) -> dict[str, Any]:
    row = {"kernel": name, **vars(case), "error": error, "right": right, **device_provenance()}
    if not torch.cuda.is_available():
        return row
    from triton.testing import do_bench

    microseconds = 1e3 * do_bench(call, return_mode="median")
    return row | {"microseconds": microseconds, "gb_per_s": moved / microseconds / 1e3}


def device_provenance() -> dict[str, Any]:
    """What every row carries, the GPU in place of the CPU where there is one."""
    import triton

    found = provenance(seed=0)
    found["versions"] = found["versions"] | {"triton": triton.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


if __name__ == "__main__":
    main()
