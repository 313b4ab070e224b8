"""Print the tables of README.md and docs/performance.md as Markdown, from the result files."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.common.models import ROOT

RESULTS = ROOT / "benchmarks" / "results"
AMX = "amx"
"""Subfolder of the results of a CPU with AMX."""

NAMES = MappingProxyType(
    {
        "smollm2": "bf16",
        "smollm2-fast": "`fast`",
        "smollm2-speed": "the same codes, 8-bit lm_head",
        "smollm2-w8a8": "vLLM's W8A8",
        "smollm2-w4a16": "vLLM's W4A16",
        "qwen2-1.5b": "bf16",
        "qwen2-1.5b-w4a4kv4": "W4A4KV4, 8-bit lm_head",
    }
)

PRESETS = MappingProxyType(
    {
        "fast": (
            "4, 4, 4 bits",
            "a learned rotation folded into the weights, equalization, inputs less their mean, clip search, "
            "first tokens corrected, GPTQ, error feedback of keys",
        ),
        "best": (
            "4, 4, 4 bits, in groups",
            "a rotation learned for groups, equalization, clip search, GPTQ with tokens weighted by gradients, "
            "refined rounding, error feedback of keys, distillation",
        ),
        "balanced": ("as `best`, input of down_proj at 8 bits", "as `best`"),
        "w4a8kv4": ("4, 8, 4 bits", "as `best`"),
        "w4a16kv4": ("4, 16, 4 bits", "as `best`"),
    }
)
"""Presets of the README's table, with bits and method."""

Rows = list[dict[str, Any]]


def main() -> None:
    """Print a table for each result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    folder = parser.parse_args().results
    print("\n\n".join([presets(folder), *tables(folder), *tables(folder / AMX)]))


def tables(folder: Path) -> list[str]:
    """Return the Markdown tables of the result files in `folder`, without those of its subfolders."""
    files = {name: folder / name for name in TABLES}
    return [TABLES[name](json.loads(file.read_text())) for name, file in files.items() if file.is_file()]


def presets(folder: Path) -> str:
    """Return the README's table: presets with their KL divergence to bf16, from the simulation."""
    kl = {
        row["model"].removeprefix("smollm2-"): _measured(row, "simulated_kl")
        for row in json.loads((folder / "accuracy.json").read_text())
    }
    shown = {name: f"`{name}`" + " (default)" * (name == "fast") for name in PRESETS}
    lines = [[shown[name], *words, kl.get(name, "not measured")] for name, words in PRESETS.items()]
    return _markdown(("preset", "weights, activations, KV cache", "method", "KL to bf16"), lines)


def accuracy(rows: Rows) -> str:
    """Tabulate the main columns of `benchmarks.accuracy.run`; `benchmarks.accuracy.table` prints all of them."""
    quarot = next(row["simulated_kl"] for row in rows if row["model"] == "smollm2-quarot")
    heads = ("preset", "perplexity", "KL to bf16", "below quarot", "top-1 agreement", "mean of six tasks")
    lines = []
    for row in rows:
        name, kl = row["model"], row.get("simulated_kl")
        below = "" if kl is None or kl >= quarot else f"{1 - kl / quarot:.0%}"
        cells = [_measured(row, "perplexity", 1), _measured(row, "simulated_kl"), below]
        cells += [_measured(row, "top1_agreement"), _measured(row["task_mean"], "score")]
        lines.append([_name(name), *cells, f"{row['bits_per_weight']:.2f}"])
    return _markdown((*heads, "bits per weight"), lines)


def _name(model: str) -> str:
    return NAMES.get(model, f"`{model.removeprefix('smollm2-')}`")


def _measured(row: dict[str, Any], name: str, digits: int = 3) -> str:
    return "" if row.get(name) is None else f"{row[name]:,.{digits}f} ± {row[f'{name}_se']:,.{digits}f}"


def served(rows: Rows) -> str:
    """Tabulate the speed relative to the first model, by case: median and range."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        case = f"{row['input_tokens']:,} in, {row['output_tokens']} out, {row['concurrent']} at a time"
        text = f"{row['times_as_fast']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        cells.setdefault(row["model"], {})[case] = "1" if row["model"] == rows[0]["model"] else text
    cases = list(next(iter(cells.values())))
    lines = [[_name(model), *(by_case[case] for case in cases)] for model, by_case in cells.items()]
    return _markdown(("served, compiled", *cases), lines)


def offline(rows: Rows) -> str:
    """Tabulate the relative speed of engines without a server, by vLLM's command."""
    rows = [row for row in rows if row["command"] != "vllm bench serve"]
    gains = {(row["model"], row["command"]): f"{row['times_as_fast']:.2f}" for row in rows}
    models, commands = (list(dict.fromkeys(key[place] for key in gains)) for place in (0, 1))
    lines = [[_name(model), *(gains[model, command] for command in commands)] for model in models]
    return _markdown(("compiled, no server", *(f"`{command}`" for command in commands)), lines)


def contexts(rows: Rows) -> str:
    """Tabulate the second model's token latency relative to the first model's, by context length."""
    first, second = dict.fromkeys(row["model"] for row in rows)
    by_context = {(row["model"], row["input_tokens"]): row for row in rows}
    lines = []
    for context in dict.fromkeys(row["input_tokens"] for row in rows):
        bf16, ours = by_context[first, context], by_context[second, context]
        gains = [bf16[figure] / ours[figure] for figure in ("median_ttft_ms", "median_tpot_ms")]
        lines.append([f"{context:,}", *(f"{gain:.1f}" for gain in gains)])
    heads = ("tokens of prompt", "the first token, times as fast as bf16", "the next tokens, times as fast as bf16")
    return _markdown(heads, lines)


def linears(rows: Rows) -> str:
    """Tabulate the speed of linear layers relative to bf16, by number of tokens."""
    found = {(row["model"], row["candidate"], row["tokens"]): f"{row['times_as_fast']:.1f}" for row in rows}
    numbers = sorted({tokens for _, _, tokens in found})
    pairs = dict.fromkeys((model, candidate) for model, candidate, _ in found if candidate != rows[0]["candidate"])
    lines = [[*pair, *(found[(*pair, tokens)] for tokens in numbers)] for pair in pairs]
    heads = ("linears of a layer, one thread", "candidate", *(f"tokens: {tokens}" for tokens in numbers))
    return _markdown(heads, lines)


def memory(rows: Rows) -> str:
    """Tabulate the memory that a vLLM worker holds."""
    lines = [
        [
            _name(row["model"]),
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['weights_over_first']:.3f}",
            f"{row['kv_tokens']:,}",
        ]
        for row in rows
    ]
    return _markdown(("worker of", "weights, MB", "of bf16", "KV tokens in 1 GiB"), lines)


def attention(rows: Rows) -> str:
    """Tabulate the compiled attention kernel's speed relative to bf16, on the shape of an 8B model."""
    ours = [row for row in rows if row["shape"] == "8B" and row["kernel"] == "KV4 native"]
    lines = [[row["phase"], f"{row['context']:,}", f"{row['speed_of_bf16']:.1f}"] for row in ours]
    return _markdown(("attention", "tokens of context", "times as fast as vLLM's bf16"), lines)


def caches(rows: Rows) -> str:
    """Tabulate KV caches: bytes, and KL to the unquantized model."""
    lines = []
    for row in rows:
        name = f"vLLM's `{row['cache']}`, emulated" if row["emulated"] else "`kv4`, simulated"
        lines.append([name, f"{row['bytes_per_token']:,}", f"{row['kl']:.4f} ± {row['kl_se']:.4f}"])
    return _markdown(("KV cache", "bytes per token", "KL to bf16"), lines)


TABLES: MappingProxyType[str, Callable[[Rows], str]] = MappingProxyType(
    {
        "accuracy.json": accuracy,
        "caches.json": caches,
        "serving.json": served,
        "serving-baselines.json": served,
        "serving-qwen2-1.5b.json": served,
        "serving-concurrency.json": served,
        "serving-offline.json": offline,
        "serving-context.json": contexts,
        "linear.json": linears,
        "memory.json": memory,
        "attention.json": attention,
    }
)


def _markdown(heads: Sequence[str], lines: list[list[str]]) -> str:
    rule = "|" + "---|" * len(heads)
    return "\n".join([_line(heads), rule, *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
