"""Draw the page's plots. Only numbers and names of this project go into them."""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from offline.evaluate.page.distribution import BINS, BINS_PER_RMS, HISTOGRAM_LIMIT, LEVELS, SiteFigures
from offline.evaluate.page.measure import Measurement
from offline.evaluate.page.summary import LABELS
from offline.output.report import BudgetReport

BEFORE, AFTER, LEVEL = "#D55E00", "#0072B2", "#555555"
"""Vermillion and blue of Okabe and Ito, a palette for the color-blind."""
LARGER = "after, larger"
WIDTH = 11.0  # inches
SMALLEST_DENSITY = 1e-5
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g}%")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "infoquant",
}


def to_svg(figure: Figure) -> str:
    """Return a figure as a data URI; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def criteria(found: Measurement) -> Figure:
    """Plot range, entropy and error over the layers: a column per site, a row per figure."""
    rows = {"range": "range, RMS", "entropy": "entropy, bits of 4", "error": "rounding error,\nshare of energy"}
    with _grid(len(rows), len(found.after), 5.6, sharex=True, sharey="row") as (figure, grid):
        for (name, label), axes in zip(rows.items(), grid, strict=True):
            axes[0].set_ylabel(label)
            for site, ax in zip(found.after, axes, strict=True):
                for values, style in _series(found, site):
                    ax.plot([_number(getattr(layer, name)) for layer in values], **style)
        grid[0][0].set_yscale("log", base=2)
        grid[0][0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        grid[1][0].set_ylim(0, 4)
        grid[2][0].set_yscale("log")
        grid[2][0].yaxis.set_major_formatter(PERCENT)
        for site, top, bottom in zip(found.after, grid[0], grid[2], strict=True):
            top.set_title(LABELS[site])
            bottom.set_xlabel("layer")
            bottom.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        _legend(figure, grid[0][0])
    return figure


def histograms(found: Measurement, site: str, layers: Sequence[int], bits: Sequence[int]) -> Figure:
    """Plot histograms of some layers of a site in units of the RMS, before above after, with the levels.

    `bits` are those of the site by layer, 16 where unquantized. The axes are the same; where they leave the
    quantized values small, a further row shows these larger.
    """
    views = [("before", found.before, BEFORE), ("after", found.after, AFTER)]
    rows = [(word, [by_site[site][layer] for layer in layers], color) for word, by_site, color in views if by_site]
    reach = max(_reach(figures) for _, row, _ in rows for figures in row)
    closer = max(map(_reach, rows[-1][1]))
    limits = [reach] * len(rows)
    if closer < reach / 2:
        rows.append((LARGER, rows[-1][1], AFTER))
        limits.append(closer)
    with _grid(len(rows), len(layers), 0.3 + 1.65 * len(rows), sharey=True) as (figure, grid):
        for (word, row, color), axes, limit in zip(rows, grid, limits, strict=True):
            axes[0].set_ylabel("share of values\nper RMS")
            for layer, figures, ax in zip(layers, row, axes, strict=True):
                _histogram(ax, figures, limit, color, bits[layer])
                ax.set_title(f"layer {layer}, {word}", loc="left")
                if word != LARGER:
                    text = f"range {figures.range:.1f} RMS, {figures.entropy:.2f} bits"
                    ax.set_title(text, loc="right", color=color)
        for ax in grid[-1]:
            ax.set_xlabel("value / RMS of the values that share its scale")
    return figure


def occupancy(found: Measurement) -> Figure:
    """Plot the share of values at each of 16 levels, most used first."""
    ranks = range(1, LEVELS + 1)
    with _grid(1, len(found.after), 2.1, sharex=True, sharey=True) as (figure, grid):
        for site, ax in zip(found.after, grid[0], strict=True):
            for values, style in _series(found, site):
                ax.plot(ranks, torch.stack([layer.occupancy for layer in values]).nanmean(0).numpy(), **style)
            ax.axhline(1 / LEVELS, color=LEVEL, lw=0.8, ls=":", label="uniform: 4 bits")
            ax.set_title(LABELS[site])
            ax.set_xlabel("level, most used first")
            ax.set_xticks([1, 4, 8, 12, 16])
        grid[0][0].set_ylabel("share of values")
        _legend(figure, grid[0][0])
    return figure


def error_maps(maps: dict[str, dict[str, list[float]]]) -> Figure:
    """Plot maps of errors over layers (across) and places (down), one under the other; NaN stays gray."""
    arrays = [np.array(list(rows.values()), dtype=float) for rows in maps.values()]
    heights, layers = [len(array) for array in arrays], arrays[0].shape[1]
    norm = _log_norm(np.concatenate(arrays))
    with _grid(len(maps), 1, 0.8 + 0.3 * len(maps) + 0.24 * sum(heights), height_ratios=heights) as (figure, grid):
        for (title, rows), values, (ax,) in zip(maps.items(), arrays, grid, strict=True):
            picture = ax.pcolormesh(np.ma.masked_invalid(values), cmap="cividis", norm=norm)
            ax.set_facecolor("#CCCCCC")
            ax.grid(False)
            ax.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
            step = math.ceil(layers / 16)
            ax.set_xticks(np.arange(0, layers, step) + 0.5, [str(layer) for layer in range(0, layers, step)])
            ax.tick_params(length=0)
            ax.invert_yaxis()
            ax.set_title(title, loc="left")
        ax.set_xlabel("layer")
        bar = figure.colorbar(
            picture, ax=[ax for (ax,) in grid], label="share of energy", aspect=25, pad=0.01, extend="min"
        )
        bar.ax.yaxis.set_major_formatter(PERCENT)
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def clip_ratios(clips: dict[str, list[torch.Tensor]]) -> Figure:
    """Plot clip ratios of minimum and maximum over the layers; for a site with groups, their mean and extremes."""
    with _grid(1, len(clips), 2.1, sharex=True, sharey=True) as (figure, grid):
        for (site, factors), ax in zip(clips.items(), grid[0], strict=True):
            layers, dot = range(len(factors)), "." if len(factors) == 1 else ""
            for end, color, line, word in ((0, BEFORE, "-", "of the minimum"), (1, AFTER, "--", "of the maximum")):
                values = [own[:, end] for own in factors]
                lowest, highest, means = ([f(own).item() for own in values] for f in (torch.min, torch.max, torch.mean))
                ax.fill_between(layers, lowest, highest, color=color, alpha=0.2, lw=0)
                ax.plot(layers, means, color=color, ls=line, lw=1.4, marker=dot, label=word)
            ax.set_title(LABELS[site])
            ax.set_xlabel("layer")
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        smallest = min(own.min().item() for factors in clips.values() for own in factors)
        grid[0][0].set_ylim(smallest - 0.05, 1.03)
        grid[0][0].set_ylabel("clip ratio")
        _legend(figure, grid[0][0])
    return figure


def pareto(budget: BudgetReport) -> Figure:
    """Plot predicted KL against bits per weight: the best choices, one format everywhere, and what was chosen."""
    with _grid(1, 1, 3.2) as (figure, ((ax,),)):
        ax.plot(*zip(*budget.curve, strict=True), color=AFTER, lw=1.4, marker=".", label="formats chosen by layer")
        points = list(budget.uniform.values())
        ax.plot(*zip(*points, strict=True), color=BEFORE, ls="", marker="s", ms=4, label="one format of weights")
        for words, point in budget.uniform.items():
            ax.annotate(words, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
        ax.plot(budget.bits_per_weight, budget.kl, color=LEVEL, ls="", marker="*", ms=12, label="this checkpoint")
        ax.set_xlabel("bits per weight of the linear layers, with scales")
        ax.set_ylabel("predicted KL,\nnats per token")
        ax.set_ylim(bottom=0)
        _legend(figure, ax)
    return figure


@contextmanager
def _grid(rows: int, columns: int, height: float, **subplots: Any) -> Iterator[tuple[Figure, list[list[Axes]]]]:
    """Yield a figure with rows of axes in the page's style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        ratios = subplots.pop("height_ratios", None)
        axes = figure.subplots(rows, columns, squeeze=False, height_ratios=ratios, **subplots)
        yield figure, axes.tolist()


def _series(found: Measurement, site: str) -> Iterator[tuple[list[SiteFigures], dict[str, Any]]]:
    """Yield the figures of a site over the layers with their line style; a single layer is a dot."""
    line = {"lw": 1.4, "marker": "." if len(found.after[site]) == 1 else ""}
    if found.before is not None:
        yield found.before[site], line | {"color": BEFORE, "label": "before (the source)", "ls": "--"}
    yield found.after[site], line | {"color": AFTER, "label": "after (quantizer inputs)"}


def _histogram(ax: Axes, figures: SiteFigures, limit: float, color: str, num_bits: int) -> None:
    edges = np.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, BINS + 1)
    first, last = np.searchsorted(edges, (-limit, limit))
    density = figures.density.numpy()[first - 1 : last].clip(min=SMALLEST_DENSITY)
    ax.stairs(density, edges[first - 1 : last + 1], baseline=SMALLEST_DENSITY, fill=True, color=color)
    ax.set_xlim(-limit, limit)
    if figures.levels is not None and num_bits == 4:
        for level in np.linspace(*figures.levels, 2**num_bits):
            ax.axvline(level, color=LEVEL, lw=0.5)
    elif figures.levels is not None:
        ax.axvspan(*figures.levels, color=LEVEL, alpha=0.15, lw=0)
    ax.set_yscale("log")
    ax.set_ylim(SMALLEST_DENSITY, BINS_PER_RMS)
    ax.set_yticks([1e-4, 1e-2, 1])


def _reach(figures: SiteFigures) -> float:
    """Return the RMS to which a histogram is shown: all but 1e-5 of the values at either end, and every level."""
    covered = figures.density.cumsum(0) / BINS_PER_RMS
    shown = ((covered > 1e-5) & (covered < 1 - 1e-5)).nonzero() - BINS // 2
    levels = figures.levels or (-1.0, 1.0)
    furthest = max(*map(abs, levels), *(abs(bin) / BINS_PER_RMS for bin in shown.flatten().tolist()))
    return min(1.05 * furthest, HISTOGRAM_LIMIT - 1)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _log_norm(values: np.ndarray) -> LogNorm:
    """Scale colors from the largest value down to a fiftieth of it."""
    known = values[np.isfinite(values)]
    largest = max(known.max(), 1e-12) if len(known) else 1.0
    return LogNorm(largest / 50, largest)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
