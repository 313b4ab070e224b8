"""Tiles of the kernels, by architecture and shape."""

from functools import cache
from typing import NamedTuple

import torch
import triton

from infoquant_vllm.kernels.triton.weights import Layout

BAND = 8
FEW_TOKENS = 32
INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were defined


class Tile(NamedTuple):
    """A program of `int4_linear`: channels, tokens and features of a step, and how it is launched."""

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1


def linear_tile(arch: int, tokens: int, channels: int, shape: Layout) -> Tile:
    """The tile of a product of so many tokens on a GPU of compute capability `arch`, 90 for 9.0."""
    block_k = shape.block_k(128)
    if tokens <= 32:
        return Tile(64, 16 if tokens <= 16 else 32, block_k, 4, 4, 2)
    return Tile(128, 128, block_k, 4, 3)


def current_device() -> torch.device:
    """Where kernels run: the current GPU, or this CPU under the interpreter."""
    return torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())


@cache
def architecture(device: torch.device) -> int:
    """Ten times a GPU's compute capability; under the interpreter that of the first that is served."""
    if device.type == "cpu":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
