"""Compile every kernel for every architecture, for the shapes of real models, and predict what bounds it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.provenance import write_rows, write_whole
from benchmarks.static.bars import broken
from benchmarks.static.cases import MODELS
from benchmarks.static.choose import choose
from benchmarks.static.kernels import ENTRIES
from benchmarks.static.launches import launches
from benchmarks.static.machines import MACHINES
from benchmarks.static.predict import row
from benchmarks.static.report import layer_table, markdown
from benchmarks.static.sass import compiled


def main() -> None:
    """Print a layer's times and what is beyond a bar, and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--archs", nargs="+", type=int, choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--kernels", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS])
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--markdown", type=Path, help="file to write tables to")
    parser.add_argument("--choose", action="store_true", help="print the best tiles of each architecture, and no more")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    if options.choose:
        for arch in options.archs:
            console.print(arch, choose(arch))
        return
    found = rows(options.kernels, options.archs, options.models)
    beyond = broken(found)
    if options.markdown:
        write_whole(markdown(found, beyond), options.markdown)
    if options.json:
        write_rows(found, options.json)
    console.print(layer_table(found), *(f"beyond a bar: {line}" for line in beyond), sep="\n")
    codes = len({(row["kernel"], row["arch"], row["configuration"]) for row in found})
    console.print(f"{len(found)} predictions, {codes} configurations compiled; nothing was measured")


def rows(kernels: Sequence[str], archs: Sequence[int], models: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row per launch and GPU."""
    cases = [
        case
        for name in kernels
        for model in MODELS
        if models is None or model.name in models
        for case in ENTRIES[name].cases(model)
    ]
    return [
        row(case, launch, compiled(launch, arch), MACHINES[arch])
        for arch in archs
        for case in cases
        for launch in launches(case.call, arch)
    ]


if __name__ == "__main__":
    main()
