"""Examine an installation: what it has, which kernels will serve, what is missing, and how to fix it.

Importing this module imports neither torch nor vLLM, since it is for installations that lack them.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

DISTRIBUTION, ENTRY_POINT = "infoquant-vllm", "infoquant"
RECOMPILE = "apt install g++ (or set CXX to a compiler), then pip install -v --force-reinstall --no-deps, as before"


@dataclass(frozen=True)
class Finding:
    """Report one thing examined; `advice` is what to do if it is not in order, or could be better."""

    subject: str
    in_order: bool
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Examine everything; takes seconds, since vLLM is imported."""
    return [*packages(), plugin(), compiler(), *serving()]


def packages() -> Iterator[Finding]:
    """Compare Python and every required package with the range it was tested with."""
    yield Finding(subject="Python", in_order=sys.version_info >= (3, 11), found=sys.version.split()[0])
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding(DISTRIBUTION, False, "not installed", "pip install . in its folder")
        return
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield package(requirement)


def package(requirement: Requirement) -> Finding:
    """Compare a package with its range; a local version ("+cpu") counts as the version itself."""
    fix = f"pip install '{requirement}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(subject=requirement.name, in_order=False, found="not installed", advice=fix)
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(subject=requirement.name, in_order=True, found=version)
    found = f"{version}, tested with {requirement.specifier}"
    return Finding(subject=requirement.name, in_order=False, found=found, advice=fix)


def plugin() -> Finding:
    """Examine whether vLLM will load this plugin."""
    names = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if ENTRY_POINT not in names:
        found = "not among vLLM's entry points"
        advice = f"install {DISTRIBUTION} into the environment that holds vLLM ({sys.prefix})"
    elif allowed is not None and ENTRY_POINT not in allowed.split(","):
        found, advice = f"VLLM_PLUGINS={allowed} leaves it out", f"unset VLLM_PLUGINS, or add {ENTRY_POINT}"
    else:
        found, advice = f"quantization method {ENTRY_POINT}", ""
    return Finding(subject="plugin", in_order=not advice, found=found, advice=advice)


def serving() -> list[Finding]:
    """Examine which kernels will serve, if torch and vLLM can be imported at all."""
    try:
        return [*forced(), *platform()]
    except Exception as error:  # a broken installation raises anything
        found = f"cannot be examined ({type(error).__name__}: {error})"
        return [Finding("kernels", False, found, "put the packages above in order first")]


def forced() -> Iterator[Finding]:
    """Examine the kernels that INFOQUANT_KERNELS forces, or else those for this CPU."""
    from infoquant_vllm.kernels.dispatch import FORCE, forced_kernels

    try:
        word = forced_kernels()
    except ValueError as error:
        yield Finding(subject=FORCE, in_order=False, found=str(error), advice=f"unset {FORCE}")
        return
    if word is not None:
        advice = f"unset {FORCE} where this is no test" if word != "cpu" else ""
        yield Finding(subject=FORCE, in_order=True, found=f"{word} kernels alone", advice=advice)
    if word in (None, "cpu"):
        yield cpu_kernels()


def cpu_kernels() -> Finding:
    """Examine the kernels for this CPU: in order is the best library that its features allow."""
    from infoquant_vllm.kernels.cpu import library
    from infoquant_vllm.kernels.dispatch import backend

    usable, loaded = library.runnable(), library.library()
    found, advice = backend("cpu").name, ""
    if not usable:
        found += f": no AVX2 here, which the least of {', '.join(library.TARGETS)} needs"
        advice = "serve on an x86-64 CPU with AVX2"
    elif loaded.handle is None:
        found += f": the library for {loaded.target} cannot be used ({loaded.problem})"
        advice = RECOMPILE
    elif loaded.target != usable[0]:
        found += f", but this CPU has {usable[0]}"
        advice = f"a newer compiler is needed: {RECOMPILE}"
    return Finding(subject="CPU kernels", in_order=not advice, found=found, advice=advice)


def platform() -> Iterator[Finding]:
    """Examine the platform vLLM was built for, and whether there are kernels for it."""
    if importlib.util.find_spec("vllm") is None:
        return  # `packages` has reported it
    from vllm.platforms import current_platform

    from infoquant_vllm.kernels.dispatch import OF_DEVICE, backend

    device = current_platform.device_type or "unknown"
    found, advice = device, ""
    try:
        found += f": {backend(device).name}"
    except (NotImplementedError, ValueError) as error:
        advice = f"{error}" if device in OF_DEVICE else "use a build of vLLM for CPUs or for CUDA"
    yield Finding(subject="vLLM's platform", in_order=not advice, found=found, advice=advice)


def compiler() -> Finding:
    """Examine what torch.compile needs on a CPU; without it vLLM serves with --enforce-eager alone."""
    named, headers = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include")) / "Python.h"
    missing = [name for name, found in ((named, shutil.which(named)), (str(headers), headers.exists())) if not found]
    found = f"{' and '.join(missing)}: missing" if missing else f"{shutil.which(named)}, {headers}"
    advice = f"apt install g++ python3.{sys.version_info.minor}-dev, or serve with --enforce-eager" if missing else ""
    return Finding(subject="torch.compile", in_order=not missing, found=found, advice=advice)


def print_findings(findings: list[Finding]) -> None:
    """Print a table of the findings, and below it the advice."""
    console, table = Console(), Table("", "", "found")
    for finding in findings:
        mark = "[green]ok[/]" if finding.in_order else "[red]NO[/]"
        table.add_row(finding.subject, mark, Text(finding.found, overflow="fold"))
    console.print(table)
    for finding in findings:
        if finding.advice:
            console.print(f"{finding.subject}: {finding.advice}", markup=False, highlight=False, soft_wrap=True)
