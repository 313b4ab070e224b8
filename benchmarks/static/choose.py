"""Tiles of the GEMM for an architecture: those of least predicted time, together over the shapes of all models."""

from collections.abc import Callable, Iterator
from math import inf
from types import MappingProxyType
from typing import Any

from benchmarks.static.cases import MODELS
from benchmarks.static.kernels import linear_call
from benchmarks.static.launches import launches
from benchmarks.static.machines import MACHINES
from benchmarks.static.predict import predict
from benchmarks.static.sass import compiled
from infoquant_vllm.kernels.triton.tiles import TILE_TABLE, ArchTiles, Tile, split_k
from infoquant_vllm.kernels.triton.weights import layout

PROMPT = 2048
NEAR = 1.05
_WIDTHS = {16: (64, 128), 32: (64, 128, 256), 64: (64, 128, 256), 128: (128, 256)}
CANDIDATES = MappingProxyType(
    {
        kind: tuple(
            tuple(Tile(n, m, k, warps, 4 if m <= 64 else 3) for n in widths for k in depths for warps in (4, 8))
            for m, widths in _WIDTHS.items()
            if kind == "row" or m <= 64
        )
        for kind, depths in (("row", (128, 256)), ("groups", (128,)))
    }
)
"""By kind, for up to block_m tokens each, the last for prompts."""


def choose(arch: int) -> ArchTiles:
    """The best tile of each kind: of those within NEAR of the fastest the one that issues least beside its products."""
    row, groups = (tuple(_best(arch, kind, tiles) for tiles in CANDIDATES[kind]) for kind in ("row", "groups"))
    return ArchTiles(row, groups, _sms(arch))


def _sms(arch: int) -> int:
    return TILE_TABLE[arch].sms


def _best(arch: int, kind: str, tiles: tuple[Tile, ...]) -> Tile:
    tokens = PROMPT if tiles == CANDIDATES[kind][-1] else tiles[0].block_m
    scored = {tile: _seconds(arch, kind, tokens, tile) for tile in tiles}
    fastest = min(seconds for seconds, _ in scored.values())
    near = {tile: issue for tile, (seconds, issue) in scored.items() if seconds <= NEAR * fastest}
    return min(near, key=lambda tile: near[tile])


def _seconds(arch: int, kind: str, tokens: int, tile: Tile) -> tuple[float, float]:
    """Predicted for all shapes, in all and of issue; infinite where a tile spills, does not fit or does not compile."""
    total = issue = 0.0
    for call in _calls(arch, kind, tokens, tile):
        try:
            for launch in launches(call, arch):
                code = compiled(launch, arch)
                if code.spills or code.shared > MACHINES[arch].shared_limit:
                    return inf, inf
                prediction = predict(launch, code, MACHINES[arch])
                total, issue = total + prediction.seconds, issue + prediction.issue
        except RuntimeError:  # of the compiler, about a tile that it cannot do
            return inf, inf
    return total, issue


def _calls(arch: int, kind: str, tokens: int, tile: Tile) -> Iterator[Callable[[], Any]]:
    """Products of every linear, with groups of 128 and, where spills are likelier, of 64."""
    for model in MODELS:
        for features, channels in model.linears.values():
            for size in (128, 64) if kind == "groups" else (features,):
                shape = layout(features, features // size, 4)
                own = tile._replace(block_k=shape.block_k(tile.block_k))
                own = own._replace(splits=split_k(own, tokens, channels, shape, _sms(arch)))
                yield linear_call(tokens, features, channels, features // size, tile=own)
