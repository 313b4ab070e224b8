"""Result rows of `benchmarks.accuracy.run` as a picture."""

from pathlib import Path
from typing import Any

PANELS = {
    "simulated_kl": "KL to the reference, nats per token\n(simulated, whole vocabulary)",
    "perplexity": "perplexity\n(served)",
    "task_mean": "mean of the tasks\n(served)",
}
LOGARITHMIC = ("simulated_kl", "perplexity")


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """A panel per figure and a line per model, with bars of one standard error; dashed: the reference."""
    from matplotlib.figure import Figure  # not a package that the tool itself needs

    panels = {name: title for name, title in PANELS.items() if any(name in row for row in rows)}
    picture = Figure(figsize=(4 * len(panels) + 2, 1.4 + 0.5 * len(rows)), layout="constrained")
    axes = picture.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for height, row in enumerate(rows):
            mean, error = _figure(row, name)
            if mean is not None:
                axis.errorbar(mean, height, xerr=error, fmt="o", capsize=3, color="black" if height == 0 else "C0")
                value = f"{mean:.0f}" if mean >= 1000 else f"{mean:#.3g}"
                axis.annotate(value, (mean, height), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        if (reference := _figure(rows[0], name)[0]) is not None:
            axis.axvline(reference, color="black", linestyle="--", linewidth=0.8)
        if name in LOGARITHMIC:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.08)  # room for the numbers
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", which="both", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    picture.savefig(file, dpi=120)


def _figure(row: dict[str, Any], name: str) -> tuple[float | None, float | None]:
    found, key = (row.get(name, {}), "score") if name == "task_mean" else (row, name)
    return found.get(key), found.get(f"{key}_se")


def _label(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['model']}\nfailed"
    bits, added = row.get("bits_per_weight"), row["multiply_adds_added"] / row["multiply_adds"]
    return f"{row['model']}\n{'' if bits is None else f'{bits:.2f} bits per weight, '}+{added:.1%} multiply-adds"
