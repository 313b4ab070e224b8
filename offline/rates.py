"""How fast this machine does what a run consists of, measured in a few seconds on small pieces of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from infoquant_vllm.format import WeightArgs
from offline.algorithms.gptq import gptq, unit_factor
from offline.algorithms.rotations import hadamard_product, random_hadamard
from offline.algorithms.rtn import search_scales
from offline.progress import silent
from offline.recipe import Psot
from offline.stages.rotate_shared import learn_rotation

SIZE, RUNS = 1024, 5
ROTATION_SIZE = 512


@dataclass(frozen=True)
class Rates:
    """Seconds for one unit of each kind of work.

    float32, float64: a multiply-add of a large product; few: of a product with `SIZE` / 8 rows
    factor: K^3 of a Cholesky factor
    search: a weight, of the search for scales; row: a weight, of rounding row after row
    hadamard: a number in float64 through a Hadamard transform
    turn: hidden^3 of a step of `learn_rotation`
    element: a number read and written once
    """

    float32: float
    float64: float
    few: float
    factor: float
    search: float
    row: float
    hadamard: float
    turn: float
    element: float


def measure(hadamard_size: int) -> Rates:
    """On the CPU, for a run whose largest Hadamard transform has that size."""
    generator = torch.Generator().manual_seed(0)
    single = torch.randn(SIZE, SIZE, generator=generator)
    double, args = single.double(), WeightArgs(num_bits=4)
    eye, weight = torch.eye(SIZE), torch.randn(SIZE, 256, generator=generator)
    rows = torch.randn(64, hadamard_size, generator=generator).double()
    float32 = _seconds(lambda: single @ single) / SIZE**3
    search = _seconds(lambda: search_scales(weight, args)) / weight.numel()
    rounding = _seconds(lambda: gptq(weight, eye[:256, :256], args, 0.01)) / weight.numel()
    transform = _seconds(lambda: hadamard_product(rows)) / rows.numel()
    steps, start = Psot(steps=2, batch_tokens=64), random_hadamard(ROTATION_SIZE, generator)
    turning = _seconds(lambda: learn_rotation(single[:64, :ROTATION_SIZE], start, 1, steps, generator, silent)) / 2
    return Rates(
        float32=float32,
        float64=_seconds(lambda: double @ double) / SIZE**3,
        few=_seconds(lambda: single[: SIZE // 8] @ single) / (SIZE**3 / 8),
        factor=_seconds(lambda: unit_factor(eye, 0.01)) / SIZE**3,
        search=search,
        row=max(rounding - search - 128 * float32, 0.0),
        hadamard=transform,
        turn=turning / ROTATION_SIZE**3,
        element=_seconds(lambda: single.double().float()) / (3 * single.numel()),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Of the fastest of some runs, after one that warms up: others use the processor too."""
    work()
    found = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)
