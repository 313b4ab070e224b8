"""What an installation has, what will serve, what is missing, and what mends it. For people; imports vLLM last."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infoquant_vllm.format import QUANT_METHOD
from infoquant_vllm.kernels.native.library import TARGETS, library, runnable
from infoquant_vllm.ops.table import FORCE, KERNELS, OF_DEVICE, forced_family, served_by

DISTRIBUTION = "infoquant-vllm"
COMPILE_ANEW = "apt install g++ (or set CXX to a compiler), then pip install -v --force-reinstall --no-deps, as before"


class Finding(BaseModel):
    """One thing looked at; `advice` is what to do where it is not in order, or could be better."""

    subject: str
    in_order: bool
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything; takes seconds, since vLLM is imported."""
    return [*packages(), plugin(), *choice(), *platform()]


def packages() -> Iterator[Finding]:
    """Python, and every package that this one needs, against the range it was tested with."""
    yield Finding(subject="Python", in_order=sys.version_info >= (3, 11), found=sys.version.split()[0])
    for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield package(requirement)


def package(requirement: Requirement) -> Finding:
    """One package against its range; a local version ("+cpu") counts as the version itself."""
    mend = f"pip install '{requirement}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(subject=requirement.name, in_order=False, found="not installed", advice=mend)
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(subject=requirement.name, in_order=True, found=version)
    found = f"{version}, tested with {requirement.specifier}"
    return Finding(subject=requirement.name, in_order=False, found=found, advice=mend)


def plugin() -> Finding:
    """Whether vLLM will load this plugin."""
    names = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if QUANT_METHOD not in names:
        found = "not among vLLM's entry points"
        advice = f"install {DISTRIBUTION} into the environment that holds vLLM ({sys.prefix})"
    elif allowed is not None and QUANT_METHOD not in allowed.split(","):
        found, advice = f"VLLM_PLUGINS={allowed} leaves it out", f"unset VLLM_PLUGINS, or add {QUANT_METHOD}"
    else:
        found, advice = f"quantisation method {QUANT_METHOD}", ""
    return Finding(subject="plugin", in_order=not advice, found=found, advice=advice)


def choice() -> Iterator[Finding]:
    """The family of kernels that INFOQUANT_KERNELS forces, or else what serves on this CPU."""
    try:
        family = forced_family()
    except ValueError as error:
        yield Finding(subject=FORCE, in_order=False, found=str(error), advice=f"unset {FORCE}")
        return
    if family is not None:
        advice = f"unset {FORCE} where this is no test" if family != "cpu" else ""
        yield Finding(subject=FORCE, in_order=True, found=f"{family} kernels alone", advice=advice)
    if family in (None, "cpu"):
        yield cpu_kernels()
    yield compiler()


def cpu_kernels() -> Finding:
    """Which kernels serve on this CPU: in order is the best library that its features allow."""
    usable, loaded = runnable(), library()
    found, advice = ", ".join(sorted({served_by(operation) for operation, _ in KERNELS})), ""
    if not usable:
        found += f": no AVX2 here, which the least of {', '.join(TARGETS)} needs"
        advice = "serve on an x86-64 CPU with AVX2"
    elif loaded.handle is None:
        found += f": the library for {loaded.target} cannot be used ({loaded.problem})"
        advice = COMPILE_ANEW
    elif loaded.target != usable[0]:
        found += f", but this CPU has {usable[0]}"
        advice = f"a newer compiler is needed: {COMPILE_ANEW}"
    return Finding(subject="CPU kernels", in_order=not advice, found=found, advice=advice)


def compiler() -> Finding:
    """What torch.compile needs on a CPU; without it vLLM serves with --enforce-eager alone."""
    named, headers = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include")) / "Python.h"
    missing = [name for name, there in ((named, shutil.which(named)), (str(headers), headers.exists())) if not there]
    found = f"{' and '.join(missing)}: not there" if missing else f"{shutil.which(named)}, {headers}"
    advice = f"apt install g++ python3.{sys.version_info.minor}-dev, or serve with --enforce-eager" if missing else ""
    return Finding(subject="torch.compile", in_order=not missing, found=found, advice=advice)


def platform() -> Iterator[Finding]:
    """What vLLM was built for, and whether everything that a W4A4KV4 layer needs has a kernel there."""
    if importlib.util.find_spec("vllm") is None:
        return  # which `packages` has said
    from vllm.platforms import current_platform

    device = current_platform.device_type or "unknown"
    found, advice = device, ""
    try:
        found += f": {served_by('linear', 'kv_store', 'kv_attention', device=device)}"
    except (NotImplementedError, ValueError) as error:
        advice = f"{error}" if device in OF_DEVICE else "use a build of vLLM for CPUs or for CUDA"
    yield Finding(subject="vLLM's platform", in_order=not advice, found=found, advice=advice)


def print_findings(findings: list[Finding]) -> None:
    """A table of them, and below it what to do."""
    console, table = Console(), Table("", "", "found")
    for finding in findings:
        mark = "[green]ok[/]" if finding.in_order else "[red]NO[/]"
        table.add_row(finding.subject, mark, Text(finding.found, overflow="fold"))
    console.print(table)
    for finding in findings:
        if finding.advice:
            console.print(f"{finding.subject}: {finding.advice}", markup=False, highlight=False, soft_wrap=True)
