"""Record where a result comes from, so that it can be read and repeated later; write result files."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common.models import ROOT
from infoquant_vllm.kernels.cpu.library import runnable
from offline.output.atomic import atomic_file

CHANGES = ("status", "--porcelain", "--", ":!benchmarks/results")
"""Arguments of git that list the changes a result may depend on: all but earlier results."""
PACKED_COMMIT = ROOT / ".gpu" / "commit"
"""Written by `make gpu-pack`, for machines without git."""
PACKAGES = ("infoquant-vllm", "vllm", "torch", "transformers")


def provenance(seed: int) -> dict[str, Any]:
    """Return commit, versions, machine, the best instruction set that has kernels, time and seed.

    A fact that this machine cannot tell is None; `commit` is "unknown".
    """
    return {
        "commit": _commit(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": f"{_processor()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "instructions": next(iter(runnable()), None),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
    }


def gpu_provenance(seed: int) -> dict[str, Any]:
    """Return `provenance` with the versions of Triton and CUDA, the GPU (if any) and its driver."""
    found = provenance(seed)
    found["versions"] |= {"triton": _version("triton"), "cuda": torch.version.cuda}
    name, driver = _gpu()
    return found | {"device": name or found["device"], "driver": driver}


def write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    """Write a JSON list with one row per line: small in git, and a diff shows which rows changed."""
    write_whole("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", file)


def write_whole(text: str, file: Path) -> None:
    """Write a text file atomically; make its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        partial.write_text(text, encoding="utf-8")


def _commit() -> str:
    commit = _git("rev-parse", "--short", "HEAD")
    if commit:
        return commit + ("+changes" if _git(*CHANGES) else "")
    return PACKED_COMMIT.read_text(encoding="utf-8").strip() if PACKED_COMMIT.is_file() else "unknown"


def _git(*arguments: str) -> str | None:
    return _output_of("git", "-C", str(ROOT), *arguments)


def _output_of(*command: str) -> str | None:
    """Return the output of a program without the line end; None if it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpu() -> tuple[str | None, str | None]:
    """Return name and driver of the first GPU, without a CUDA context, which would take memory from a server."""
    printed = _output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if printed:
        name, _, driver = printed.splitlines()[0].rpartition(", ")
        return name, driver
    return (torch.cuda.get_device_name() if torch.cuda.is_available() else None), None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
