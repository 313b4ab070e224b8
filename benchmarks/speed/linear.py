"""Time the linear layers of a decoder layer of real models: ours against bf16 and vLLM's other formats.

Candidates run interleaved on one thread. Rotating and quantizing the input is part of the time, as in a server. A row
is a model, a number of tokens and a candidate; its time is the sum over qkv, o, gate_up and down.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from vllm import _custom_ops

from benchmarks.common.interleaved import Candidate, copies, time_interleaved
from benchmarks.common.provenance import provenance, write_rows
from benchmarks.speed.gemms import bf16_handlers, int4_weights, int8_handlers, w4a8_weights
from infoquant_vllm.kernels.cpu.kernels import linear, prepare_matrices
from infoquant_vllm.kernels.cpu.library import library
from infoquant_vllm.kernels.operands import InputQuant

MODELS = MappingProxyType(
    {  # by site: features, channels
        "SmolLM2-135M": {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)},
        "Qwen2-1.5B": {"qkv": (1536, 2048), "o": (1536, 1536), "gate_up": (1536, 17920), "down": (8960, 1536)},
        "Llama-3-8B": {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)},
    }
)
TOKENS = (1, 16, 256)
GROUP = 64  # group size of vLLM's W4A16 and W4A8


@dataclass(frozen=True)
class Codes:
    """Bits of the activations, and group sizes of weights and activations; None is per row and per token."""

    num_bits: int
    weight_group: int | None = None
    input_group: int | None = None


OURS = MappingProxyType(
    {
        "W4A4 (fast)": Codes(4),
        "W4A4 in groups (best)": Codes(4, 64, 32),
        "W4A8 in groups": Codes(8, 64),
        "W4A16 in groups": Codes(16, 64),
    }
)


def main() -> None:
    """Measure, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.linear", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate, site and number of tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and inputs")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    common = {"kernels": f"native {library().target}", "threads": 1, **provenance(options.seed)}
    rows = [row | common for model in options.models for row in layer(model, TOKENS, options.seconds)]
    Console().print(table(rows))
    if options.json:
        write_rows(rows, options.json)


def layer(model: str, numbers: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Return a row per number of tokens and candidate: microseconds of all linears, the sum of the sites' medians."""
    sites: dict[int, dict[str, dict[str, float]]] = {tokens: {} for tokens in numbers}
    for site, (features, channels) in MODELS[model].items():
        makers = candidates(site, features, channels)
        for tokens in numbers:
            x = torch.randn(tokens, features).bfloat16()
            found = time_interleaved({name: make(x) for name, make in makers.items()}, seconds)
            sites[tokens][site] = {row["candidate"]: row["median_us"] for row in found}
    return [row for tokens in numbers for row in _rows(model, tokens, sites[tokens])]


def _rows(model: str, tokens: int, sites: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    totals = {name: sum(by_name[name] for by_name in sites.values()) for name in next(iter(sites.values()))}
    bf16 = next(iter(totals.values()))
    return [
        {
            "operation": "linear",
            "model": model,
            "tokens": tokens,
            "candidate": name,
            "median_us": round(total, 1),
            "sites_us": {site: by_name[name] for site, by_name in sites.items()},
            "times_as_fast": round(bf16 / total, 3),
        }
        for name, total in totals.items()
    ]


Maker = Callable[[torch.Tensor], Candidate]
"""Makes the candidate for an input [tokens, features]; the weights are made once for all inputs."""


def candidates(site: str, features: int, channels: int) -> dict[str, Maker]:
    """Return the makers of all candidates; the first one is bf16."""
    makers = {
        "vLLM bf16": _bf16(features, channels),
        "vLLM W8A8": _w8a8(features, channels),
        "vLLM W4A16": _w4a16(features, channels),
    }
    if torch.cpu._is_amx_tile_supported():  # vLLM serves W4A16 checkpoints as W4A8 there
        makers["vLLM W4A8"] = _w4a8(features, channels)
    return makers | {name: _ours(site, features, channels, codes) for name, codes in OURS.items()}


def _ours(site: str, features: int, channels: int, codes: Codes) -> Maker:
    hadamard = features if site == "down" else 0
    weight_groups = features // (codes.weight_group or features)
    groups = features // (codes.input_group or features)
    clip = None if codes.num_bits == 16 else torch.full((groups, 2), 0.9)
    weights = int4_weights(features, channels, weight_groups)
    inputs = InputQuant(prepare_matrices([], hadamard), hadamard, clip, codes.num_bits, symmetric=False)

    def run(x: torch.Tensor, i: int) -> torch.Tensor:
        return linear(x, inputs, weights[i % len(weights)], None)

    return lambda x: partial(run, x)


def _bf16(features: int, channels: int) -> Maker:
    """Run vLLM's kernel for unquantized models."""
    handlers = bf16_handlers(features, channels)
    return lambda x: lambda i: _custom_ops.onednn_mm(handlers[i % len(handlers)], x, None)


def _w8a8(features: int, channels: int) -> Maker:
    """Run vLLM's kernels for compressed-tensors' W8A8: quantize the input per token, then oneDNN's GEMM."""
    handlers = int8_handlers(features, channels)

    def run(x: torch.Tensor, out: torch.Tensor, i: int) -> torch.Tensor:
        codes, scale, _ = _custom_ops.onednn_scaled_int8_quant(x)
        return _custom_ops.onednn_scaled_mm(handlers[i % len(handlers)], codes, out, scale, None, None, None)

    return lambda x: partial(run, x, torch.empty(len(x), channels, dtype=x.dtype))


def _w4a16(features: int, channels: int) -> Maker:
    """Run the kernel of vLLM's AWQ, GPTQ and compressed-tensors layers with 4-bit weights."""
    scale = torch.rand(features // GROUP, channels).bfloat16()
    count = copies(channels * features // 2)
    weights = [torch.randint(-(2**31), 2**31, (channels // 16, features * 2), dtype=torch.int32) for _ in count]
    hint = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    run: Callable[..., torch.Tensor] = _custom_ops.cpu_gemm_wna16
    return lambda x: lambda i: run(x, weights[i % len(weights)], scale, None, None, 8, hint)


def _w4a8(features: int, channels: int) -> Maker:
    """Run the kernel of those layers on CPUs with AMX, unless VLLM_CPU_INT4_W4A8=0; it quantizes its input."""
    weights = w4a8_weights(features, channels, GROUP)
    return lambda x: lambda i: _custom_ops.int4_scaled_mm_cpu(x, *weights[i % len(weights)], None)


def table(rows: list[dict[str, Any]]) -> Table:
    """Format the rows for a terminal."""
    printed = Table(title=f"{rows[0]['kernels']}, one thread, a decoder layer's linears together, microseconds")
    for heading in ("model", "tokens", "candidate", "median", "times as fast as bf16"):
        printed.add_column(heading)
    for row in rows:
        numbers = f"{row['median_us']:.0f}", f"{row['times_as_fast']:.2f}"
        printed.add_row(row["model"], str(row["tokens"]), row["candidate"], *numbers)
    return printed


if __name__ == "__main__":
    main()
