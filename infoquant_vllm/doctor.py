"""What an installation has, what will serve, what is missing, and what mends it.

Imports neither torch nor vLLM before it has looked for them: it is there for installations that lack them.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infoquant_vllm.finding import Finding

DISTRIBUTION, ENTRY_POINT = "infoquant-vllm", "infoquant"


def examine() -> list[Finding]:
    """Look at everything; takes seconds, since vLLM is imported."""
    return [*packages(), plugin(), compiler(), *serving()]


def packages() -> Iterator[Finding]:
    """Python, and every package that this one needs, against the range it was tested with."""
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
    if ENTRY_POINT not in names:
        found = "not among vLLM's entry points"
        advice = f"install {DISTRIBUTION} into the environment that holds vLLM ({sys.prefix})"
    elif allowed is not None and ENTRY_POINT not in allowed.split(","):
        found, advice = f"VLLM_PLUGINS={allowed} leaves it out", f"unset VLLM_PLUGINS, or add {ENTRY_POINT}"
    else:
        found, advice = f"quantization method {ENTRY_POINT}", ""
    return Finding(subject="plugin", in_order=not advice, found=found, advice=advice)


def serving() -> list[Finding]:
    """What will serve here, as far as torch and vLLM can be imported at all."""
    try:
        from infoquant_vllm.doctor_kernels import choice, platform

        return [*choice(), *platform()]
    except Exception as error:  # a broken installation raises anything
        found = f"cannot be examined ({type(error).__name__}: {error})"
        return [Finding("kernels", False, found, "put the packages above in order first")]


def compiler() -> Finding:
    """What torch.compile needs on a CPU; without it vLLM serves with --enforce-eager alone."""
    named, headers = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include")) / "Python.h"
    missing = [name for name, there in ((named, shutil.which(named)), (str(headers), headers.exists())) if not there]
    found = f"{' and '.join(missing)}: not there" if missing else f"{shutil.which(named)}, {headers}"
    advice = f"apt install g++ python3.{sys.version_info.minor}-dev, or serve with --enforce-eager" if missing else ""
    return Finding(subject="torch.compile", in_order=not missing, found=found, advice=advice)


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
