"""Time attention over the 4-bit KV cache against vLLM's bf16 attention on the CPU.

All kernels get the same queries, keys and values of one sequence, in a cache of shuffled blocks. They run interleaved
in one process, so that a slow moment of the machine affects all. The bf16 kernel is that of vLLM's CPU backend. A row
is one kernel at one length.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.common.provenance import provenance, write_rows
from infoquant_vllm.format import kv_bytes_per_token_head
from infoquant_vllm.kernels.cpu import kernels as native_kernels
from infoquant_vllm.kernels.operands import KVCalibration, KVScheme, ScoreParams, Sequences
from infoquant_vllm.kernels.torch import kv_cache as torch_kernels

BLOCK = 128
BASELINE, NATIVE, FALLBACK = "vLLM bf16", "KV4 native", "KV4 torch"
FOUR_BITS = (4, 4)  # bits of keys and of values
MIN_RUNS = 4
SHAPES = {"8B": (32, 8, 128), "SmolLM2-135M": (9, 3, 64)}  # heads, kv-heads, head size
DECODE_CONTEXTS = (256, 1024, 4096, 16384)
PREFILL_LENGTHS = (512, 1024, 2048)


@dataclass(frozen=True)
class Case:
    """The last `queries` tokens of a sequence of `context` tokens."""

    shape: str
    context: int
    queries: int

    @property
    def phase(self) -> str:
        """The phase of serving that runs such a case."""
        return "decode" if self.queries == 1 else "prefill"


def main() -> None:
    """Measure, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.attention", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="approximate duration of a case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    lengths = [(context, 1) for context in DECODE_CONTEXTS] + [(length, length) for length in PREFILL_LENGTHS]
    rows = [row for shape in SHAPES for length in lengths for row in measure(Case(shape, *length), options)]
    Console().print(table(rows))
    if options.json:
        write_rows(rows, options.json)


def measure(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per kernel: median and quartiles in microseconds, and the speed relative to bf16."""
    torch.manual_seed(options.seed)
    calls = kernels(case)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + options.seconds
    pair = [BASELINE, NATIVE]
    while len(times[BASELINE]) < MIN_RUNS or time.perf_counter() < end:
        for name in pair:
            times[name].append(microseconds(calls[name]))
        pair.reverse()  # so that neither always runs after the other
    times[FALLBACK] = [microseconds(calls[FALLBACK]) for _ in range(MIN_RUNS)]
    medians = {name: statistics.median(turns) for name, turns in times.items()}
    heads, kv_heads, size = SHAPES[case.shape]
    return [
        {
            "kernel": name,
            "shape": case.shape,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_size": size,
            "phase": case.phase,
            "context": case.context,
            "queries": case.queries,
            "microseconds": medians[name],
            "lowest": min(turns),
            "quartiles": statistics.quantiles(turns, n=4),
            "turns": len(turns),
            "speed_of_bf16": medians[BASELINE] / medians[name],
            "threads": torch.get_num_threads(),
            **provenance(options.seed),
        }
        for name, turns in times.items()
    ]


def microseconds(call: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def kernels(case: Case) -> dict[str, Callable[[], object]]:
    """Return the timed calls by name, on one set of random queries, keys and values."""
    heads, kv_heads, size = SHAPES[case.shape]
    query = torch.randn(case.queries, heads, size, dtype=torch.bfloat16)
    key, value = torch.randn(2, case.context, kv_heads, size, dtype=torch.bfloat16)
    blocks = torch.randperm(-(-case.context // BLOCK))
    places = torch.arange(case.context)
    slots = blocks[places // BLOCK] * BLOCK + places % BLOCK
    starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, case.queries], [case.context]))
    batch = (starts, lens, blocks.int()[None])
    codes = torch.zeros(len(blocks), kv_heads, BLOCK, kv_bytes_per_token_head(size, FOUR_BITS), dtype=torch.uint8)
    clip = torch.ones(kv_heads, 2)
    scheme = KVScheme(FOUR_BITS, hadamard=True)
    native_kernels.kv_store(key, value, codes, slots, KVCalibration(clip, clip, None), scheme)

    def ours(module: ModuleType) -> Callable[[], object]:
        out = torch.empty_like(query)
        return lambda: module.kv_attention(query, codes, Sequences(*batch), ScoreParams(size**-0.5), scheme, out)

    return {
        BASELINE: bf16_kernel(query, key, value, slots, batch),
        NATIVE: ours(native_kernels),
        FALLBACK: ours(torch_kernels),
    }


def bf16_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> Callable[[], object]:
    """Return the call that vLLM's CPU attention backend makes for a layer, without its preparation once per step."""
    starts, lens, table = batch
    _, kv_heads, size = key.shape
    isa = _get_attn_isa(query.dtype, BLOCK, size, "auto")
    common: dict[str, Any] = {"causal": True, "dynamic_causal": None, "kv_cache_dtype": "auto"}
    cache = torch.zeros(table.shape[1], kv_heads, 2 * BLOCK, size, dtype=query.dtype)
    keys, values = cache.chunk(2, 2)
    vllm_ops.cpu_attn_reshape_and_cache(
        key, value, keys, values, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    scheduled = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lens),
        num_heads=query.shape[1],
        num_kv_heads=kv_heads,
        head_dim=size,
        seq_lens=lens,
        dtype=query.dtype,
        query_start_loc=starts,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        **common,
    )
    out = torch.empty_like(query)
    return lambda: vllm_ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=keys,
        value_cache=values,
        output=out,
        query_start_loc=starts,
        seq_lens=lens,
        scale=size**-0.5,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=table,
        softcap=0.0,
        scheduler_metadata=scheduled,
        s_aux=None,
        k_scale=1.0,
        v_scale=1.0,
        **common,
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """Format the rows for a terminal."""
    printed = Table(title=f"Attention of one layer, {rows[0]['threads']} threads (median, quartiles)")
    for heading in ("shape", "phase", "tokens", "kernel", "microseconds", "quartiles", "x bf16"):
        printed.add_column(heading)
    for row in rows:
        low, _, high = row["quartiles"]
        spread, speed = f"{low:.0f} to {high:.0f}", f"{row['speed_of_bf16']:.2f}"
        names = (row["shape"], row["phase"], str(row["context"]), row["kernel"])
        printed.add_row(*names, f"{row['microseconds']:.0f}", spread, speed)
    return printed


if __name__ == "__main__":
    main()
