"""What every kernel is held to."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from benchmarks.static.cases import MODELS
from benchmarks.static.machines import MACHINES
from infoquant_vllm.kernels.triton.tiles import FEW_TOKENS

PROMPT_ARCHS = (80, 86, 89, 90)
MAX_ISSUE_PER_MMA = 0.6
PROMPT = 2048  # tokens, from which that is asked
MAX_ISSUE_PER_DRAM = 0.5
MAX_BYTES_PER_CACHE = 1.05
MAX_STEP = 1.2  # of a layer's time: one token more can cost a tile of them more, and tokens need not fill tiles
MAX_FALL = 0.9
LAYER_SCHEMES = ("A4 per token", "A4 per head")  # of W4A4's linears
OWN_CACHE = "4 bits, "  # what begins the scheme of a model's own cache
Rows = list[dict[str, Any]]


def broken(rows: Rows) -> list[str]:
    """What of the rows is beyond a bar, a line each; empty where all is well."""
    return list(dict.fromkeys([line for row in rows for line in _broken(row)] + steps(rows)))


def layers(rows: Rows) -> dict[tuple[str, int], dict[int, float]]:
    """Predicted seconds of all linears of a layer, by (model, arch) and then by tokens in their order."""
    found: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["kernel"] in ("gemm", "split_k_reduce") and row["scheme"] in LAYER_SCHEMES:
            own = found.setdefault((row["model"], row["arch"]), {}).setdefault(row["tokens"], {})
            own[row["layer"]] = own.get(row["layer"], 0) + row["predicted_seconds"]
    whole = MODELS[0].linears.keys()
    return {
        key: {tokens: sum(own.values()) for tokens, own in sorted(by_tokens.items()) if own.keys() == whole}
        for key, by_tokens in found.items()
    }


def steps(rows: Rows) -> list[str]:
    """Where a layer's predicted time grows by more than its tokens, or falls, from one number of tokens to the next."""
    lines = []
    for (model, arch), seconds in layers(rows).items():
        for (fewer, before), (more, after) in pairwise(seconds.items()):
            who = f"linears of {model} sm_{arch}, {fewer} to {more} tokens: {1e6 * before:.1f} to {1e6 * after:.1f} us"
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
        yield f"{who}: {row['shared']} bytes of shared memory, at most {machine.shared_limit} there {of}"
    if row["kernel"] in ("gemm", "kv_attention", "kv_decode"):
        # A decoding program has fewer rows than the instructions of a whole warp group take.
        expected = "mma.sync" if row["kernel"] == "kv_decode" else machine.instructions
        if not _is_int8(row["mma"], expected):
            yield f"{who}: tensor cores by {row['mma'] or 'nothing'}, expected int8 by {expected} {of}"
    yield from _beyond_its_own_bars(row, who, of)


def _beyond_its_own_bars(row: dict[str, Any], who: str, of: str) -> Iterable[str]:
    if row["kernel"] == "kv_decode" and row["scheme"].startswith(OWN_CACHE):
        if row["bound"] != "dram":
            yield f"{who}: bound by {row['bound']}, expected memory {of}"
        if row["bytes"] > MAX_BYTES_PER_CACHE * row["must_read"]:
            share = row["bytes"] / row["must_read"]
            yield f"{who}: {share:.3f} of the cache's bytes, at most {MAX_BYTES_PER_CACHE} {of}"
    if row["kernel"] != "gemm":
        return
    prompt = row["scheme"] == "A4 per token" and row["tokens"] >= PROMPT
    if prompt and row["arch"] in PROMPT_ARCHS and row["issue_per_mma"] > MAX_ISSUE_PER_MMA:
        share = f"{row['issue_per_mma']:.2f} of the tensor cores' cycles"
        yield f"{who}: issue takes {share}, at most {MAX_ISSUE_PER_MMA} {of}"
    few = row["scheme"] in LAYER_SCHEMES and row["tokens"] <= FEW_TOKENS
    if few and row["issue_per_dram"] > MAX_ISSUE_PER_DRAM:
        share = f"{row['issue_per_dram']:.2f} of memory's cycles"
        yield f"{who}: issue takes {share}, at most {MAX_ISSUE_PER_DRAM} {of}"


def _is_int8(mma: str, instructions: str) -> bool:
    return mma.startswith(instructions) and ("s8" in mma or "kind::i8" in mma)
