"""Tiles of `int4_linear` for an architecture: those of least predicted time, together over the shapes of all models."""

from collections.abc import Callable, Iterator
from math import inf
from typing import Any

from benchmarks.static.cases import MODELS
from benchmarks.static.kernels import linear_call
from benchmarks.static.launches import launches
from benchmarks.static.machines import MACHINES
from benchmarks.static.predict import predict
from benchmarks.static.sass import compiled
from infoquant_vllm.kernels.triton import configurations
from infoquant_vllm.kernels.triton.configurations import Choice, Tile

PROMPT = 2048
NEAR = 1.05
MANY = tuple(Tile(n, m, 128, warps, 3) for n, m, warps in ((128, 64, 8), (128, 128, 4), (128, 128, 8), (128, 256, 8)))
FEW = tuple(Tile(n, 16, k, 4, 4) for n, k in ((64, 256), (64, 128), (128, 128)))
FIELDS = {"row": (PROMPT, MANY), "groups": (PROMPT, MANY), "few": (1, FEW), "few_groups": (1, FEW)}


def choose(arch: int) -> Choice:
    """The best tile of each kind: of those within NEAR of the fastest the one that issues least beside its products."""
    chosen = configurations.CHOICES[arch]
    for field, (tokens, candidates) in FIELDS.items():
        scored = {tile: _seconds(arch, field, tokens, _with(chosen, field, tile)) for tile in candidates}
        best = min(seconds for seconds, _ in scored.values())
        near = {tile: issue for tile, (seconds, issue) in scored.items() if seconds <= NEAR * best}
        chosen = _with(chosen, field, min(near, key=lambda tile: near[tile]))
    return chosen


def _with(choice: Choice, field: str, tile: Tile) -> Choice:
    fields: dict[str, Any] = choice._asdict() | {field: tile}
    return Choice(**fields)


def _seconds(arch: int, field: str, tokens: int, choice: Choice) -> tuple[float, float]:
    """Predicted for all shapes, in all and of issue; infinite where a tile spills, does not fit or does not compile."""
    total = issue = 0.0
    for call in _calls(field, tokens):
        try:
            for launch in launches(call, arch, choice):
                code = compiled(launch, arch)
                if code.spills or code.shared > MACHINES[arch].shared_limit:
                    return inf, inf
                prediction = predict(launch, code, MACHINES[arch])
                total, issue = total + prediction.seconds, issue + prediction.issue
        except RuntimeError:  # of the compiler, about a tile that it cannot do
            return inf, inf
    return total, issue


def _calls(field: str, tokens: int) -> Iterator[Callable[[], Any]]:
    """Products of every linear, with groups of 128 and, where spills are likelier, of 64."""
    for model in MODELS:
        for features, channels in model.linears.values():
            for size in (128, 64) if "groups" in field else (features,):
                yield linear_call(tokens, features, channels, features // size)
