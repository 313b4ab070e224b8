"""The pictures of the benchmarks' page, from result rows."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offline.evaluate.page.plots import STYLE

COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito, gray first: the one that all are compared with."""
IDEAL = 4.0  # 16 bits over 4

Rows = list[dict[str, Any]]


def served(rows: Rows) -> Figure | None:
    """Times as fast as bf16, a group of bars per case."""
    rows = [row for row in rows if row["command"] == "vllm bench serve" and row["times_as_fast"] != 1]
    cases = _ordered(
        (row["model"].split("-")[0], row["input_tokens"], row["output_tokens"], row["concurrent"]) for row in rows
    )
    models = _ordered(row["model"] for row in rows)
    if not rows:
        return None
    with _panels(1, 1, 1.2 + 0.35 * len(rows)) as (figure, (axes,)):
        height = 0.0
        ticks: list[tuple[float, str]] = []
        for case in cases:
            own = [row for row in rows if (row["model"].split("-")[0], *_shape(row)) == case]
            ticks.append((height + (len(own) - 1) / 2, f"{case[0]}: {case[1]} in, {case[2]} out, {case[3]} at a time"))
            for row in own:
                ends = [[row["times_as_fast"] - row["lowest"]], [row["highest"] - row["times_as_fast"]]]
                color = COLOURS[1 + models.index(row["model"]) % (len(COLOURS) - 1)]
                axes.barh(height, row["times_as_fast"], xerr=ends, color=color, capsize=2)
                axes.annotate(
                    f"{row['model']} {row['times_as_fast']:.2f}", (0.02, height), va="center", color="white", fontsize=7
                )
                height += 1
            height += 0.6
        axes.axvline(1, color=COLOURS[0], linewidth=1)
        axes.axvline(IDEAL, color=COLOURS[0], linewidth=1, linestyle="--")
        axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
        axes.invert_yaxis()
        axes.set_xlabel("times as fast as bf16 (solid line); dashed: a quarter of the bytes")
    return figure


def latency(rows: Rows) -> Figure | None:
    """Delays over requests at a time."""
    rows = [row for row in rows if row["command"] == "vllm bench serve" and row["output_tokens"] > 1]
    sizes = _ordered((row["model"].split("-")[0], row["input_tokens"]) for row in rows)
    chosen = [size for size in sizes if len({row["concurrent"] for row in rows if _of(row, size)}) > 2]
    if not chosen:
        return None
    own = [row for row in rows if _of(row, chosen[0])]
    with _panels(1, 2, 3.6) as (figure, panels):
        for axes, name, label in zip(
            panels, ("median_ttft_ms", "median_tpot_ms"), ("first token, ms", "next token, ms"), strict=True
        ):
            _lines(axes, own, "concurrent", name)
            axes.set(xlabel=f"requests at a time ({chosen[0][1]} tokens in)", ylabel=label)
        panels[0].legend()
    return figure


def growth(rows: Rows) -> Figure | None:
    """Delays over the tokens of a prompt."""
    rows = [row for row in rows if row["command"] == "vllm bench serve" and row["concurrent"] == 1]
    kinds = _ordered(row["model"].split("-")[0] for row in rows)
    chosen = [kind for kind in kinds if len({row["input_tokens"] for row in rows if row["model"].startswith(kind)}) > 2]
    if not chosen:
        return None
    own = [row for row in rows if row["model"].startswith(chosen[0]) and row["output_tokens"] > 1]
    with _panels(1, 2, 3.6) as (figure, panels):
        for axes, name, label in zip(
            panels, ("median_ttft_ms", "median_tpot_ms"), ("prompt, ms", "next token, ms"), strict=True
        ):
            _lines(axes, own, "input_tokens", name)
            _slope(axes)
            axes.set(xlabel="tokens before it", ylabel=label)
        panels[0].legend()
    return figure


def linears(rows: Rows) -> Figure:
    """Times as fast over tokens, a panel per model."""
    models = _ordered(row["model"] for row in rows)
    with _panels(1, len(models), 3.6, sharey=True) as (figure, panels):
        for axes, model in zip(panels, models, strict=True):
            _lines(axes, [row for row in rows if row["model"] == model], "tokens", "times_as_fast", "contender")
            axes.axhline(IDEAL, color=COLOURS[0], linestyle="--", linewidth=1)
            axes.set(title=model, xlabel="tokens", yscale="linear")
        panels[0].set_ylabel("times as fast as bf16")
        panels[0].legend(fontsize=7)
    return figure


def attention(rows: Rows) -> Figure:
    """Times as fast over the context, a panel per shape and phase."""
    cases = _ordered((row["shape"], row["phase"]) for row in rows)
    with _panels(1, len(cases), 3.2, sharey=True) as (figure, panels):
        for axes, (shape, phase) in zip(panels, cases, strict=True):
            own = [row for row in rows if (row["shape"], row["phase"]) == (shape, phase)]
            _lines(axes, own, "context", "speed_of_bf16", "kernel")
            axes.set(title=f"{shape}, {phase}", xlabel="tokens", yscale="linear")
        panels[0].set_ylabel("times as fast as vLLM's bf16")
        panels[0].legend(fontsize=7)
    return figure


def accuracy(rows: Rows) -> Figure:
    """KL over bits per weight."""
    with _panels(1, 1, 4.0) as (figure, (axes,)):
        names: dict[tuple[float, float], list[str]] = {}  # of those that would be written over each other, together
        for row in rows:
            if "simulated_kl" in row:
                place = row["bits_per_weight"], row["simulated_kl"]
                axes.errorbar(*place, yerr=row["simulated_kl_se"], fmt="o", color=COLOURS[1], capsize=2)
                names.setdefault((round(place[0], 1), round(place[1], 2)), []).append(row["model"].split("-", 1)[-1])
        for place, together in names.items():
            axes.annotate(", ".join(together), place, (6, 3), textcoords="offset points", fontsize=8)
        axes.set(xlabel="bits per weight", ylabel="KL to bf16, nats per token", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    return figure


def quantizing(rows: Rows) -> Figure:
    """Seconds and peak memory over millions of weights."""
    rows = [row | {"millions": row["weights"] / 1e6, "peak_mb": row["peak_bytes"] / 1e6} for row in rows]
    with _panels(1, 2, 3.2) as (figure, panels):
        for axes, name, label in zip(
            panels, ("seconds", "peak_mb"), ("seconds", "peak of the process, MB"), strict=True
        ):
            _lines(axes, rows, "millions", name, "preset")
            axes.set(xlabel="weights, million", ylabel=label)
        _slope(panels[0])
        panels[0].legend()
    return figure


def _lines(axes: Axes, rows: Rows, x: str, y: str, by: str = "model") -> None:
    """A line per value of `by`, on logarithmic axes; more rows of one x are a mean."""
    for index, name in enumerate(_ordered(row[by] for row in rows)):
        points: dict[float, list[float]] = {}
        for row in rows:
            if row[by] == name:
                points.setdefault(row[x], []).append(row[y])
        places = sorted(points)
        heights = [sum(points[place]) / len(points[place]) for place in places]
        axes.plot(places, heights, "o-", color=COLOURS[index % len(COLOURS)], label=str(name), markersize=3)
    axes.set(xscale="log", yscale="log")
    places = _ordered(row[x] for row in rows)
    axes.set_xticks(places, [f"{place:,.0f}" for place in places], minor=False)
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(1.5, 0.5)))  # below a decade


def _slope(axes: Axes) -> None:
    """A dotted line of slope 1 through the middle of what is drawn."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    middle = (low * high) ** 0.5 / (left * right) ** 0.5
    axes.plot([left, right], [middle * left, middle * right], ":", color=COLOURS[0], linewidth=1)
    axes.set(xlim=(left, right), ylim=(low, high))


def _shape(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["input_tokens"], row["output_tokens"], row["concurrent"]


def _of(row: dict[str, Any], size: tuple[str, int]) -> bool:
    return (row["model"].split("-")[0], row["input_tokens"]) == size


def _ordered(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


@contextmanager
def _panels(rows: int, columns: int, height: float, **options: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.0, height), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)
