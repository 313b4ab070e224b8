"""What every row of a result carries, so that it can be read and repeated later."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.models import ROOT
from infoquant_vllm.kernels.native.library import runnable
from offline.writer import atomic_file

CHANGES = ("status", "--porcelain", "--", ":!benchmarks/results")
"""What a result may hang on: not on results written before it."""


def provenance(seed: int) -> dict[str, Any]:
    """Commit, versions, machine, the best instructions that there are kernels for, time and seed."""
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git(*CHANGES) else ""),
        "versions": {name: version(name) for name in ("infoquant-vllm", "vllm", "torch", "transformers")},
        "device": f"{_processor()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "instructions": next(iter(runnable()), ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
    }


def write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    """Write rows as JSON."""
    write_whole(json.dumps(rows, indent=1) + "\n", file)


def write_whole(text: str, file: Path) -> None:
    """Write a text file that is never seen half-written; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def _git(*arguments: str) -> str:
    """What git says, without a line end; nothing outside a repository."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=False, capture_output=True, text=True
    ).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
