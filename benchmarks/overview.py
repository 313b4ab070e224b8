"""Draw the README's picture from the result files: accuracy by preset, and speed against memory."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.models import ROOT
from benchmarks.readme import RESULTS

PICTURE = ROOT / "docs" / "assets" / "overview.svg"
PRESETS = ("quarot", "paper", "fast", "best", "balanced", "w4a8kv4", "w4a16kv4")
SERVED = {
    "smollm2": ("bf16", True),
    "smollm2-w4a16": ("vLLM W4A16", True),
    "smollm2-w8a8": ("vLLM W8A8", False),
    "smollm2-fast": ("W4A4KV4 (fast)", True),
    "smollm2-speed": ("W4A4KV4, 8-bit lm_head", True),
}
"""Label of each served model, and whether it stands above its point."""
OURS, OTHERS = "#1B6CA8", "#9A9A9A"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "infoquant",
    "svg.fonttype": "none",  # text stays text: a small file
}

Rows = list[dict[str, Any]]


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overview", description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.parse_args().output.write_text(draw(RESULTS))


def draw(results: Path) -> str:
    """Return the picture as SVG; equal result files give equal bytes."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        _accuracy(left, _read(results / "accuracy.json"))
        _speed(right, _read(results / "serving-baselines.json"), _read(results / "memory.json"))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _read(file: Path) -> Rows:
    rows: Rows = json.loads(file.read_text())
    return rows


def _accuracy(axes: Axes, rows: Rows) -> None:
    by_preset = {row["model"].removeprefix("smollm2-"): row for row in rows}
    names = [preset for preset in PRESETS if preset in by_preset]
    chosen = [by_preset[preset] for preset in names]
    axes.barh(
        names,
        [row["simulated_kl"] for row in chosen],
        xerr=[row["simulated_kl_se"] for row in chosen],
        color=[OTHERS if preset in ("quarot", "paper") else OURS for preset in names],
    )
    for place, row in enumerate(chosen):
        label = f"{row['bits_per_weight']:.2f} bits per weight"
        axes.text(row["simulated_kl"] + 0.03, place, label, va="center", fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("KL to bf16, nats per token: less is better")
    axes.set_title("Accuracy, SmolLM2-135M", loc="left")


def _speed(axes: Axes, speeds: Rows, memory: Rows) -> None:
    most = max(row["concurrent"] for row in speeds)
    fast = {row["model"]: row["times_as_fast"] for row in speeds if row["concurrent"] == most}
    for row in memory:
        name, above = SERVED[row["model"]]
        x, y = row["weights_over_first"], fast[row["model"]]
        ours = name.startswith("W4A4")
        axes.scatter(x, y, s=row["kv_tokens"] / 600, color=OURS if ours else OTHERS, zorder=2)
        axes.annotate(
            f"{name}\n{row['kv_tokens']:,} KV tokens in 1 GiB",
            (x, y),
            (12, 5) if ours else (0, 8 if above else -8),
            textcoords="offset points",
            ha="left" if ours else "center",
            va="center" if ours else "bottom" if above else "top",
            fontsize=7,
        )
    axes.set_xlim(0.1, 1.2)
    axes.set_ylim(0, 3.5)
    axes.set_xlabel("memory of the weights, of bf16")
    axes.set_ylabel(f"times as fast as bf16, {most} requests")
    axes.set_title("Speed and memory, two CPU cores", loc="left")


if __name__ == "__main__":
    main()
