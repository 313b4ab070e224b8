"""Thresholds that every kernel must meet, and predictions as Markdown."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.static.cases import LAYER_TOKENS, MODELS
from benchmarks.static.kernels import LAYER_SCHEMES
from benchmarks.static.predict import MACHINES
from infoquant_vllm.kernels.triton.tiles import FEW_TOKENS

PREDICTED = "Predicted from compiled code and data sheets; nothing on this page was measured on a GPU."
PROMPT_ARCHS = (80, 86, 89, 90)
MAX_ISSUE_PER_MMA = 0.6
PROMPT = 2048  # tokens from which MAX_ISSUE_PER_MMA holds
MAX_ISSUE_PER_DRAM = 0.5
MAX_BYTES_PER_CACHE = 1.05
MAX_STEP = 1.2  # of a layer's time: one token more can cost a tile of them more, and tokens need not fill tiles
MAX_FALL = 0.9
OWN_CACHE = "4 bits, "  # prefix of the scheme of a model's own cache
Rows = list[dict[str, Any]]


def broken(rows: Rows) -> list[str]:
    """List what misses a threshold, a line each; empty if nothing does."""
    return list(dict.fromkeys([line for row in rows for line in _broken(row)] + steps(rows)))


def layers(rows: Rows) -> dict[tuple[str, int, str], dict[int, float]]:
    """Sum the predicted seconds of a layer's products, by (model, arch, scheme) and then by tokens in their order."""
    found: dict[tuple[str, int, str], dict[int, dict[str, float]]] = {}
    for row in rows:
        if _in_layer(row):
            key = row["model"], row["arch"], row["scheme"]
            times = found.setdefault(key, {}).setdefault(row["tokens"], {})
            times[row["layer"]] = times.get(row["layer"], 0) + row["predicted_seconds"]
    whole = MODELS[0].linears.keys()
    return {
        key: {tokens: sum(own.values()) for tokens, own in sorted(by_tokens.items()) if own.keys() == whole}
        for key, by_tokens in found.items()
    }


def steps(rows: Rows) -> list[str]:
    """List where a layer's predicted time grows by more than its tokens, or falls, as tokens grow."""
    lines = []
    for (model, arch, scheme), seconds in layers(rows).items():
        for (fewer, before), (more, after) in pairwise(seconds.items()):
            who = f"{scheme} of {model} sm_{arch}, {fewer} to {more} tokens: {1e6 * before:.1f} to {1e6 * after:.1f} us"
            if after > max(more / fewer, MAX_STEP) * before:
                lines.append(f"{who}, expected at most {max(more / fewer, MAX_STEP):.2f} times")
            elif after < MAX_FALL * before:
                lines.append(f"{who}, expected at least {MAX_FALL} times")
    return lines


def _broken(row: dict[str, Any]) -> Iterable[str]:
    machine = MACHINES[row["arch"]]
    who, of = f"{row['kernel']} sm_{row['arch']}", f"({row['scheme']}, {row['tokens']} tokens; {row['launch']})"
    if row["spills"]:
        yield f"{who}: {row['spills']} loads and stores of spilled registers, expected none {of}"
    elif row["stack"]:
        yield f"{who}: {row['stack']} bytes of a stack, expected none {of}"
    if row["shared"] > machine.shared_limit:
        yield f"{who}: {row['shared']} bytes of shared memory, at most {machine.shared_limit} on that GPU {of}"
    if row["kernel"] in ("gemm", "grouped_gemm", "kv_attention", "kv_decode"):
        # A decoding program has fewer rows than the instructions of a whole warp group take.
        expected = "mma.sync" if row["kernel"] == "kv_decode" else machine.instructions
        if not _is_int8(row["mma"], expected):
            yield f"{who}: tensor cores by {row['mma'] or 'nothing'}, expected int8 by {expected} {of}"
    yield from _broken_of_kernel(row, who, of)


def _broken_of_kernel(row: dict[str, Any], who: str, of: str) -> Iterable[str]:
    if row["kernel"] == "kv_decode" and row["scheme"].startswith(OWN_CACHE):
        if row["bound"] != "dram":
            yield f"{who}: bound by {row['bound']}, expected memory {of}"
        if row["bytes"] > MAX_BYTES_PER_CACHE * row["must_read"]:
            share = row["bytes"] / row["must_read"]
            yield f"{who}: {share:.3f} of the cache's bytes, at most {MAX_BYTES_PER_CACHE} {of}"
    if row["kernel"] != "gemm":
        return
    prompt = row["scheme"] in LAYER_SCHEMES and row["tokens"] >= PROMPT
    if prompt and row["arch"] in PROMPT_ARCHS and row["issue_per_mma"] > MAX_ISSUE_PER_MMA:
        share = f"{row['issue_per_mma']:.2f} of the tensor cores' cycles"
        yield f"{who}: issue takes {share}, at most {MAX_ISSUE_PER_MMA} {of}"
    few = row["scheme"] in LAYER_SCHEMES and row["tokens"] <= FEW_TOKENS
    if few and row["issue_per_dram"] > MAX_ISSUE_PER_DRAM:
        share = f"{row['issue_per_dram']:.2f} of memory's cycles"
        yield f"{who}: issue takes {share}, at most {MAX_ISSUE_PER_DRAM} {of}"


def _is_int8(mma: str, instructions: str) -> bool:
    return mma.startswith(instructions) and ("s8" in mma or "kind::i8" in mma)


def markdown(rows: Rows, broken: Sequence[str]) -> str:
    """Render layers by tokens, missed thresholds, what was compiled, and the first model's other launches."""
    others = [row for row in rows if row["model"] == MODELS[0].name and not _in_layer(row)]
    title = f"# GPU kernels without a GPU\n\n{PREDICTED}"
    return "\n\n".join((title, layer_table(rows), _missed(broken), _compiled(rows), _times(others))) + "\n"


def layer_table(rows: Rows) -> str:
    """Render the predicted microseconds of a layer's linears."""
    lines = [
        (model, f"sm_{arch} {MACHINES[arch].name}", scheme, *(f"{1e6 * seconds[each]:.1f}" for each in LAYER_TOKENS))
        for (model, arch, scheme), seconds in layers(rows).items()
        if seconds.keys() == set(LAYER_TOKENS)
    ]
    heads = ["model", "GPU", "scheme", *map(str, LAYER_TOKENS)]
    return "## Predicted microseconds of a layer's products, by tokens\n" + table(heads, lines)


def _in_layer(row: dict[str, Any]) -> bool:
    return row["kernel"] in ("gemm", "split_k_reduce") and row["scheme"] in LAYER_SCHEMES


def _missed(broken: Sequence[str]) -> str:
    """Render a line for all launches that miss a threshold alike."""
    counts = Counter(line.rpartition(" (")[0] or line for line in broken)
    lines = [f"- {line}" + (f" ({count} launches)" if count > 1 else "") for line, count in counts.items()]
    return "## Missed thresholds\n" + "\n".join(lines or ["Every kernel meets every threshold."])


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
    return "## What was compiled\n" + table(heads, lines)


def _times(rows: Rows) -> str:
    archs = _ordered(rows, "arch")
    heads = ["kernel", "layer", "tokens", "scheme", *(f"sm_{arch}" for arch in archs)]
    lines: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("kernel", "layer", "tokens", "scheme"))
        lines.setdefault(key, []).append(f"{1e6 * row['predicted_seconds']:.1f} {row['bound']}")
    title = f"## {MODELS[0].name}, other launches: predicted microseconds, and what bounds them\n"
    return title + table(heads, [(*key, *cells) for key, cells in lines.items()])


def _short(mma: str) -> str:
    return mma.replace(".sync.aligned", "").replace(".row.col.satfinite", "").replace(".cta_group::1", "")


def table(heads: Iterable[Any], lines: Iterable[Iterable[Any]]) -> str:
    """Render a table in Markdown."""
    heads = list(heads)
    body = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in body)


def _ordered(rows: Rows, name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))
