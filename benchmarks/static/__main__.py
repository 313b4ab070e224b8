"""Compile every kernel for every architecture, for the shapes of real models, and predict what bounds it."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.provenance import write_rows, write_whole
from benchmarks.static.cases import MODELS
from benchmarks.static.kernels import ENTRIES, linear_call
from benchmarks.static.launches import compiled, launches
from benchmarks.static.predict import MACHINES, predict, row
from benchmarks.static.report import broken, layer_table, markdown
from infoquant_vllm.kernels.triton.tiles import TILE_TABLE, ArchTiles, Tile, split_k
from infoquant_vllm.kernels.triton.weights import layout

PROMPT = 2048
NEAR = 1.05
_WIDTHS = {16: (64, 128), 32: (64, 128, 256), 64: (64, 128, 256), 128: (128, 256)}
CANDIDATES = tuple(
    tuple(Tile(n, m, k, warps, 4 if m <= 64 else 3) for n in widths for k in (128, 256) for warps in (4, 8))
    for m, widths in _WIDTHS.items()
)
"""Tiles for up to block_m tokens each, the last for prompts."""


def choose(arch: int) -> ArchTiles:
    """Return the best tiles: of those within NEAR of the fastest the one with the least issue time."""
    return ArchTiles(tuple(_best(arch, tiles) for tiles in CANDIDATES), _sms(arch))


def _sms(arch: int) -> int:
    return TILE_TABLE[arch].sms


def _best(arch: int, tiles: tuple[Tile, ...]) -> Tile:
    tokens = PROMPT if tiles == CANDIDATES[-1] else tiles[0].block_m
    scored = {tile: _seconds(arch, tokens, tile) for tile in tiles}
    fastest = min(seconds for seconds, _ in scored.values())
    near = {tile: issue for tile, (seconds, issue) in scored.items() if seconds <= NEAR * fastest}
    return min(near, key=lambda tile: near[tile])


def _seconds(arch: int, tokens: int, tile: Tile) -> tuple[float, float]:
    """Predict seconds over all shapes, in all and of issue; infinite if a tile spills, does not fit or compile."""
    total = issue = 0.0
    for call in _calls(arch, tokens, tile):
        try:
            for launch in launches(call, arch):
                code = compiled(launch, arch)
                if code.spills or code.shared > MACHINES[arch].shared_limit:
                    return inf, inf
                prediction = predict(launch, code, MACHINES[arch])
                total, issue = total + prediction.seconds, issue + prediction.issue
        except RuntimeError:  # the compiler's, for a tile that it does not support
            return inf, inf
    return total, issue


def _calls(arch: int, tokens: int, tile: Tile) -> Iterator[Callable[[], Any]]:
    """Yield GEMMs of every linear, with weights per row and in groups of 64."""
    for model in MODELS:
        for features, channels in model.linears.values():
            for size in (None, 64):
                shape = layout(features, 1, size)
                own = tile._replace(block_k=shape.block_k(tile.block_k))
                own = own._replace(splits=split_k(own, tokens, channels, shape, _sms(arch)))
                yield linear_call(tokens, features, channels, size, tile=own)


def main() -> None:
    """Print a layer's times and missed thresholds, and write the files that were asked for."""
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
    console.print(layer_table(found), *(f"missed threshold: {line}" for line in beyond), sep="\n")
    codes = len({(row["kernel"], row["arch"], row["configuration"]) for row in found})
    console.print(f"{len(found)} predictions, {codes} configurations compiled; nothing was measured")


def rows(kernels: Sequence[str], archs: Sequence[int], models: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return a row per launch and GPU."""
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
