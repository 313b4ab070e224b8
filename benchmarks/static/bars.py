"""What every kernel is held to, and the figures that must not drift."""

from collections.abc import Iterable
from math import isclose
from typing import Any

from benchmarks.static.machines import MACHINES
from infoquant_vllm.kernels.triton.configurations import FEW_TOKENS

PROMPT_ARCHS = (80, 86, 89, 90)
MAX_ISSUE_PER_MMA = 0.6
MAX_ISSUE_PER_DRAM = 0.5
MAX_BYTES_PER_CACHE = 1.05
OWN_CACHE = "4 bits, "  # what begins the scheme of a model's own cache
TOLERANCES = {"registers": (0, 16), "shared": (0.05, 0), "loop": (0.05, 8), "rest": (0.1, 32)}
"""Relative and absolute, of the golden file's figures; all else must be equal."""

Rows = list[dict[str, Any]]


def broken(rows: Rows) -> list[str]:
    """What of the rows is beyond a bar, a line each; empty where all is well."""
    return list(dict.fromkeys(line for row in rows for line in _broken(row)))


def _broken(row: dict[str, Any]) -> Iterable[str]:
    machine = MACHINES[row["arch"]]
    who = f"{row['kernel']} sm_{row['arch']} {row['scheme']}, {row['tokens']} tokens ({row['launch']})"
    if row["spills"]:
        yield f"{who}: {row['spills']} loads and stores of spilled registers, expected none"
    elif row["stack"]:
        yield f"{who}: {row['stack']} bytes of a stack, expected none"
    if row["shared"] > machine.shared_limit:
        yield f"{who}: {row['shared']} bytes of shared memory, at most {machine.shared_limit} there"
    if row["kernel"] in ("int4_linear", "kv4_attention", "kv4_decode"):
        # A decoding program has fewer rows than the instructions of a whole warp group take.
        expected = "mma.sync" if row["kernel"] == "kv4_decode" else machine.instructions
        if not _is_int8(row["mma"], expected):
            yield f"{who}: tensor cores by {row['mma'] or 'nothing'}, expected int8 by {expected}"
    yield from _beyond_its_own_bars(row, who)


def _beyond_its_own_bars(row: dict[str, Any], who: str) -> Iterable[str]:
    if row["kernel"] == "kv4_decode" and row["scheme"].startswith(OWN_CACHE):
        if row["bound"] != "dram":
            yield f"{who}: bound by {row['bound']}, expected memory"
        if row["bytes"] > MAX_BYTES_PER_CACHE * row["must_read"]:
            share = row["bytes"] / row["must_read"]
            yield f"{who}: {share:.3f} of the cache's bytes, at most {MAX_BYTES_PER_CACHE}"
    if row["kernel"] != "int4_linear":
        return
    prompt = row["scheme"] == "A4 per token" and row["tokens"] > FEW_TOKENS
    if prompt and row["arch"] in PROMPT_ARCHS and row["issue_per_mma"] > MAX_ISSUE_PER_MMA:
        yield f"{who}: issue takes {row['issue_per_mma']:.2f} of the tensor cores' cycles, at most {MAX_ISSUE_PER_MMA}"
    few = row["scheme"] in ("A4 per token", "A4 per head") and row["tokens"] <= FEW_TOKENS
    if few and row["issue_per_dram"] > MAX_ISSUE_PER_DRAM:
        yield f"{who}: issue takes {row['issue_per_dram']:.2f} of memory's cycles, at most {MAX_ISSUE_PER_DRAM}"


def _is_int8(mma: str, instructions: str) -> bool:
    return mma.startswith(instructions) and ("s8" in mma or "kind::i8" in mma)


def golden(rows: Rows) -> dict[str, dict[str, Any]]:
    """What was compiled, by kernel, architecture and configuration: a figure each that should not drift."""
    return {
        f"{row['kernel']} sm_{row['arch']} {row['configuration']}": {
            "mma": row["mma"],
            "registers": row["registers"],
            "spills": row["spills"],
            "shared": row["shared"],
            "loop": sum(row["loop"].values()),
            "rest": sum(row["rest"].values()),
        }
        for row in rows
    }


def drifted(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> list[str]:
    """Where figures are not the golden file's, within TOLERANCES; configurations that it lacks are told too."""
    lines = [f"{name}: not in the golden file" for name in found if name not in expected]
    for name in found.keys() & expected.keys():
        for key, value in found[name].items():
            relative, absolute = TOLERANCES.get(key, (0, 0))
            right = expected[name][key]
            same = (
                value == right if isinstance(value, str) else isclose(value, right, rel_tol=relative, abs_tol=absolute)
            )
            if not same:
                lines.append(f"{name}: {key} is {value}, was {right}")
    return sorted(lines)
