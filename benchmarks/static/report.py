"""Predictions for people: Markdown, and a roofline."""

from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.page_plots import COLOURS
from benchmarks.static.machines import MACHINES, Machine
from offline.page.plots import STYLE

PREDICTED = "Predicted from compiled code and data sheets; nothing on this page was measured on a GPU."
Rows = list[dict[str, Any]]


def markdown(rows: Rows, broken: Sequence[str]) -> str:
    """All rows: what was compiled, per configuration, and predicted times, per model."""
    parts = [f"# GPU kernels without a GPU\n\n{PREDICTED}", _bars(broken), _compiled(rows)]
    parts += [_times([row for row in rows if row["model"] == model]) for model in _ordered(rows, "model")]
    return "\n\n".join(parts) + "\n"


def _bars(broken: Sequence[str]) -> str:
    lines = [f"- {line}" for line in broken] or ["Every kernel is within every bar."]
    return "## Beyond a bar\n" + "\n".join(lines)


def _compiled(rows: Rows) -> str:
    unique = {(row["kernel"], row["arch"], row["configuration"]): row for row in rows}
    heads = ["kernel", "arch", "configuration", "tensor cores", "registers", "spills", "shared", "programs per SM"]
    heads += ["main loop", "issue / tensor cores", "issue / memory"]
    lines = [
        (
            row["kernel"],
            f"sm_{row['arch']}",
            row["configuration"],
            _short(row["mma"]),
            row["registers"],
            row["spills"],
            row["shared"],
            row["occupancy"],
            _mix(row["loop"]),
            "" if row["issue_per_mma"] is None else f"{row['issue_per_mma']:.2f}",
            f"{row['issue_per_dram']:.2f}" if row["loop"] else "",
        )
        for row in unique.values()
    ]
    return "## What was compiled\n" + _table(heads, lines)


def _times(rows: Rows) -> str:
    archs = _ordered(rows, "arch")
    heads = ["kernel", "layer", "tokens", "scheme", *(f"sm_{arch} {MACHINES[arch].name}" for arch in archs)]
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("kernel", "layer", "tokens", "scheme"))
        lines.setdefault(key, []).append(f"{1e6 * row['predicted_seconds']:.1f} {row['bound']}")
    title = f"## {rows[0]['model']}: predicted microseconds, and what bounds them\n"
    return title + _table(heads, [(*key, *cells) for key, cells in lines.items()])


def _mix(loop: dict[str, int]) -> str:
    most = sorted(loop.items(), key=lambda item: -item[1])[:5]
    return f"{sum(loop.values())}: " + ", ".join(f"{count} {name}" for name, count in most) if loop else "none"


def _short(mma: str) -> str:
    return mma.replace(".sync.aligned", "").replace(".row.col.satfinite", "").replace(".cta_group::1", "")


def _table(heads: Iterable[Any], lines: Iterable[Iterable[Any]]) -> str:
    heads = list(heads)
    body = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in body)


def _ordered(rows: Rows, name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def roofline(rows: Rows) -> str:
    """An SVG: predicted speed of products over multiplications per byte, a panel per GPU, the ideal as a line."""
    archs = _ordered(rows, "arch")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3 * -(-len(archs) // 3)), layout="constrained")
        panels = figure.subplots(-(-len(archs) // 3), 3, squeeze=False).flat
        for axes, arch in zip(panels, archs, strict=False):
            _panel(axes, [row for row in rows if row["arch"] == arch and row["useful_macs"]], MACHINES[arch])
        for axes in list(panels):
            axes.set_visible(False)
        figure.suptitle("Predictions: int4_linear and attention of all models; line: data sheet", fontsize=9)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _panel(axes: Any, rows: Rows, machine: Machine) -> None:
    peak = machine.sms * machine.macs * machine.clock
    ideal: Callable[[float], float] = lambda intensity: min(peak, intensity * machine.dram)  # noqa: E731
    ends = [1.0, peak / machine.dram, 1e4]
    axes.plot(ends, [ideal(x) / 1e12 for x in ends], color=COLOURS[0], linewidth=1)
    for index, tokens in enumerate(_ordered(rows, "tokens"), start=1):
        own = [row for row in rows if row["tokens"] == tokens]
        x = [row["useful_macs"] / row["bytes"] for row in own]
        y = [row["useful_macs"] / row["predicted_seconds"] / 1e12 for row in own]
        axes.plot(x, y, ".", color=COLOURS[index], label=f"{tokens} tokens")
    axes.set(xscale="log", yscale="log", title=f"{machine.name} (sm_{machine.arch})")
    axes.set(xlabel="multiplications per byte", ylabel="10^12 per second")
    axes.legend(fontsize=7)
