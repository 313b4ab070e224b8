"""One HTML page out of the result files: what was measured, drawn, and where this project loses."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from benchmarks import page_plots as plots
from benchmarks.common.models import ROOT
from benchmarks.common.provenance import write_whole
from offline.evaluate.page.plots import to_svg

RESULTS = ROOT / "benchmarks" / "results"
TEMPLATE = "page.html"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """A part of the page: result files by a pattern of their names, and how they are drawn or listed."""

    title: str
    pattern: str
    command: str
    text: str
    draw: Callable[[Rows], Figure | None] | None = None
    columns: dict[str, str] = field(default_factory=dict)


SECTIONS = (
    Section(
        "Served",
        "serving*.json",
        "python -m benchmarks.speed.serving",
        "vLLM's own `vllm bench serve`, all servers in turns: times as fast as the bf16 model in the same round.",
        plots.served,
        {
            "model": "model",
            "mode": "mode",
            "command": "by",
            "input_tokens": "in",
            "output_tokens": "out",
            "concurrent": "at a time",
            "times_as_fast": "times as fast",
            "lowest": "lowest",
            "highest": "highest",
        },
    ),
    Section(
        "Latency against concurrency",
        "serving*.json",
        "python -m benchmarks.speed.serving --ladder",
        "Time to the first token and from one token to the next, median; both axes are logarithmic.",
        plots.latency,
    ),
    Section(
        "Cost as work grows",
        "serving*.json",
        "python -m benchmarks.speed.serving --growth",
        "A line of slope 1 (dotted) is cost in proportion to the work.",
        plots.growth,
    ),
    Section(
        "Linear layers of real models",
        "linear.json",
        "python -m benchmarks.speed.linear",
        "One thread, a decoder layer's linears together, inputs rotated and quantized in the time. At one token, four "
        "times as fast as bf16 (dashed) is what reading a quarter of the bytes can give.",
        plots.linears,
    ),
    Section(
        "Kernels",
        "kernels.json",
        "python -m benchmarks.speed.kernels",
        "One thread; the ratio is of the first contender of each shape.",
        None,
        {
            "operation": "operation",
            "tokens": "tokens",
            "features": "features",
            "channels": "channels",
            "contender": "contender",
            "over_first": "time over the first's",
        },
    ),
    Section(
        "Attention over the 4-bit cache",
        "attention.json",
        "python -m benchmarks.speed.attention",
        "Kernel against kernel; vLLM's bf16 attention is 1.",
        plots.attention,
    ),
    Section(
        "Accuracy against bytes",
        "accuracy.json",
        "python -m benchmarks.accuracy.run",
        "KL to the bf16 model over the whole vocabulary, against bits per weight, scales and matrices included.",
        plots.accuracy,
    ),
    Section(
        "Memory",
        "memory.json",
        "python -m benchmarks.speed.memory",
        "What a worker holds after loading.",
        None,
        {
            "model": "model",
            "weight_bytes": "bytes of weights",
            "weights_over_first": "over bf16",
            "kv_tokens": "KV tokens in 1 GiB",
            "kv_tokens_over_first": "over bf16",
            "peak_bytes": "peak of the process",
        },
    ),
    Section(
        "Quantizing",
        "quantize.json",
        "python -m benchmarks.speed.quantize",
        "Time and peak memory of the tool against the model's size.",
        plots.quantizing,
    ),
)


def main() -> None:
    """Write the page of a folder of results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    file = options.results / "index.html"
    write_whole(render(options.results), file)
    print(file)


def render(folder: Path) -> str:
    """The page's HTML; sections without a result file are left out."""
    sections, everything = [], []
    for section in SECTIONS:
        rows = [row for file in sorted(folder.glob(section.pattern)) for row in json.loads(file.read_text())]
        figure = section.draw(rows) if rows and section.draw else None
        table = _table(rows, section.columns) if rows and section.columns else None
        if figure is None and table is None:
            continue
        everything += rows
        words: dict[str, Any] = {"title": section.title, "text": section.text, "command": section.command}
        sections.append(words | {"picture": None if figure is None else to_svg(figure), "table": table})
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return templates.get_template(TEMPLATE).render(
        sections=sections,
        losses=losses(everything),
        devices=sorted({row["device"] for row in everything}),
        commits=sorted({row["commit"] for row in everything}),
    )


def losses(rows: Rows) -> list[str]:
    """What is slower than bf16, in words."""
    found: dict[str, None] = {}
    for row in rows:
        if "times_as_fast" in row and row["times_as_fast"] < 1 and not str(row.get("contender", "")).startswith("vLLM"):
            what = row.get("contender", row["model"])
            case = f"{row['model']}, {row['tokens']} tokens" if "contender" in row else _case(row)
            found[f"{what}, {case}: {row['times_as_fast']:.2f} times as fast as bf16"] = None
        if row.get("speed_of_bf16", 1) < 1 and row["kernel"] == "KV4 native":
            case = f"{row['shape']}, {row['phase']} at {row['context']}"
            found[f"attention, {case}: {row['speed_of_bf16']:.2f} times as fast as bf16"] = None
    return list(found)


def _case(row: dict[str, Any]) -> str:
    return f"{row['input_tokens']} tokens in, {row['output_tokens']} out, {row['concurrent']} at a time ({row['mode']})"


def _table(rows: Rows, columns: dict[str, str]) -> list[list[str]]:
    return [list(columns.values())] + [[_cell(row.get(name)) for name in columns] for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
