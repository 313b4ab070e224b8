"""Predictions for people: Markdown."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.static.bars import LAYER_SCHEMES, layers
from benchmarks.static.cases import LAYER_TOKENS, MODELS
from benchmarks.static.machines import MACHINES

PREDICTED = "Predicted from compiled code and data sheets; nothing on this page was measured on a GPU."
Rows = list[dict[str, Any]]


def markdown(rows: Rows, broken: Sequence[str]) -> str:
    """Layers by tokens, what is beyond a bar, what was compiled, and the first model's other launches."""
    others = [row for row in rows if row["model"] == MODELS[0].name and not _in_layer(row)]
    title = f"# GPU kernels without a GPU\n\n{PREDICTED}"
    return "\n\n".join((title, layer_table(rows), _bars(broken), _compiled(rows), _times(others))) + "\n"


def layer_table(rows: Rows) -> str:
    """Predicted microseconds of a layer's linears."""
    lines = [
        (model, f"sm_{arch} {MACHINES[arch].name}", *(f"{1e6 * seconds[tokens]:.1f}" for tokens in LAYER_TOKENS))
        for (model, arch), seconds in layers(rows).items()
        if seconds.keys() == set(LAYER_TOKENS)
    ]
    heads = ["model", "GPU", *map(str, LAYER_TOKENS)]
    return "## Predicted microseconds of a layer's linears, by tokens\n" + _table(heads, lines)


def _in_layer(row: dict[str, Any]) -> bool:
    return row["kernel"] in ("gemm", "split_k_reduce") and row["scheme"] in LAYER_SCHEMES


def _bars(broken: Sequence[str]) -> str:
    """A line for all launches that miss a bar alike."""
    counts = Counter(line.rpartition(" (")[0] or line for line in broken)
    lines = [f"- {line}" + (f" ({count} launches)" if count > 1 else "") for line, count in counts.items()]
    return "## Beyond a bar\n" + "\n".join(lines or ["Every kernel is within every bar."])


def _compiled(rows: Rows) -> str:
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["kernel"], row["arch"]), {})[row["configuration"]] = row
    heads = ["kernel", "arch", "configurations", "tensor cores", "most registers", "with spills", "most shared memory"]
    lines = [
        (
            kernel,
            f"sm_{arch}",
            len(own),
            ", ".join(sorted({_short(row["mma"]) for row in own.values() if row["mma"]})),
            max(row["registers"] for row in own.values()),
            sum(row["spills"] > 0 for row in own.values()),
            max(row["shared"] for row in own.values()),
        )
        for (kernel, arch), own in found.items()
    ]
    return "## What was compiled\n" + _table(heads, lines)


def _times(rows: Rows) -> str:
    archs = _ordered(rows, "arch")
    heads = ["kernel", "layer", "tokens", "scheme", *(f"sm_{arch}" for arch in archs)]
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("kernel", "layer", "tokens", "scheme"))
        lines.setdefault(key, []).append(f"{1e6 * row['predicted_seconds']:.1f} {row['bound']}")
    title = f"## {MODELS[0].name}, other launches: predicted microseconds, and what bounds them\n"
    return title + _table(heads, [(*key, *cells) for key, cells in lines.items()])


def _short(mma: str) -> str:
    return mma.replace(".sync.aligned", "").replace(".row.col.satfinite", "").replace(".cta_group::1", "")


def _table(heads: Iterable[Any], lines: Iterable[Iterable[Any]]) -> str:
    heads = list(heads)
    body = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in body)


def _ordered(rows: Rows, name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))
