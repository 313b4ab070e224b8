"""The layout in which the Triton kernels read weights: packed rows, behind them sums, and a word for each run."""

from functools import cache
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F

from infoquant_vllm.kernels.operands import PackedWeight

HALF_RUN = 64  # features
STEP = 32  # features of the smallest product of the INT8 tensor cores
NO_GROUP = 128 << 8  # what a word says of a half run of padding: codes count 0 times
SUM_BYTES = 4


class Layout(NamedTuple):
    """Layout of a row of weights and of the values that meet them: equal segments, each of whole runs of bytes."""

    features: int  # of a segment
    segments: int
    grouped: bool  # there are multipliers
    run: int  # features of a run of bytes, at 4 bits the first half of them in the low nibbles
    padded: int  # features of a segment with the zeros behind them

    @property
    def stride(self) -> int:
        """Features of a row."""
        return self.segments * self.padded

    def block_k(self, largest: int) -> int:
        """Return how many features a step multiplies, about `largest`."""
        return max(gcd(self.padded, largest), self.run if self.grouped else 1)

    def steps(self, block_k: int) -> int:
        """Count the steps of the main loop through a segment."""
        return self.padded // block_k


def layout(features: int, segments: int, group_size: int | None = None) -> Layout:
    """Return the layout of rows of `features`; group_size: of weights with multipliers.

    Half a run lies in one group, so that a word has the multipliers of a run. Raises ValueError for segments and groups
    that are no multiples of 32 features.
    """
    part = features // segments
    for name, size in (("segments", part), ("groups", group_size or STEP)):
        if size % STEP or features % size:
            raise ValueError(f"{name} of {size} of {features} features: the Triton kernels need multiples of {STEP}")
    half = gcd(group_size, part, HALF_RUN) if group_size else HALF_RUN
    return _layout(part, segments, group_size is not None, half)


def _layout(part: int, segments: int, grouped: bool, half: int) -> Layout:
    run = 2 * half
    return Layout(part, segments, grouped, run, -(-part // run) * run)


def prepare_linear(weight: PackedWeight, num_bits: int, segments: int) -> PackedWeight:
    """Convert a checkpoint's weight [N, K] to what `gemm` reads, for activations in `segments`.

    packed: flat uint8, rows of codes, then int32 sums [segments, N] of the integer weights, which meet zero-points of
    the activations. Codes are signed, but unsigned where there are multipliers.
    multiplier: int32 [runs, N], a word for a run's two halves, see `_words`
    zero_point: of rows without multipliers, which `gemm` subtracts from the product

    Raises ValueError for channels that are no multiple of 16, and what `layout` refuses.
    """
    packed, scale, multiplier, zero = weight
    if len(packed) % 16:
        raise ValueError(f"{len(packed)} channels: the Triton kernels need a multiple of 16")
    half = 2 ** (num_bits - 1)
    codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten(1) if num_bits == 4 else packed
    codes = codes if zero is not None else codes ^ half
    channels, features = codes.shape
    signed = (codes ^ half << (8 - num_bits)).view(torch.int8) if num_bits == 8 else codes.view(torch.int8) - half
    if multiplier is None:
        shape, stored, integers, words = layout(features, segments), signed, signed, None
    else:
        center = torch.full_like(multiplier, half) if zero is None else zero
        shape = layout(features, segments, features // multiplier.shape[1])
        grouped = codes.view(torch.int8).view(*multiplier.shape, -1) - center.view(torch.int8)[..., None]
        integers = (grouped * multiplier.view(torch.int8)[..., None]).view(channels, -1)
        stored, words, zero = codes.view(torch.int8), _words(multiplier, center, shape), None
    sums = integers.view(channels, segments, -1).sum(-1, dtype=torch.int32).t().contiguous()
    rows = F.pad(stored.view(channels, segments, -1), (0, shape.padded - shape.features)).flatten(1)
    if num_bits == 4:
        low, high = (rows.view(channels, -1, 2, shape.run // 2) & 0xF).unbind(2)
        rows = (low | high << 4).flatten(1)
    held = torch.cat((rows.flatten().view(torch.uint8), sums.flatten().view(torch.uint8)))
    return PackedWeight(held, scale.contiguous(), words, zero)


def _words(multiplier: torch.Tensor, zero: torch.Tensor, shape: Layout) -> torch.Tensor:
    """Return int32 [runs, N]: in 16 bits of each half run its multiplier m, and 128 - zero * m, which is 1 to 128.

    So code * m + 128 - zero * m is an unsigned byte, whatever the code: four of them are computed in one register.
    """
    channels, half = len(multiplier), shape.run // 2
    pairs = multiplier.int() | 128 - zero.int() * multiplier.int() << 8
    size = shape.segments * shape.features // multiplier.shape[1]
    halves = pairs.repeat_interleave(size // half, 1).view(channels, shape.segments, -1)
    halves = F.pad(halves, (0, (shape.padded - shape.features) // half), value=NO_GROUP)
    low, high = halves.view(channels, -1, 2).unbind(2)
    return (low | high << 16).t().contiguous()


def weight_rows(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    """Return signed codes [..., features] int8 of rows of an 8-bit weight, from `prepare_linear` with one segment."""
    padded = layout(features, 1).padded
    channels = weight.numel() // (padded + SUM_BYTES)
    return F.embedding(rows, weight[: channels * padded].view(torch.int8).view(channels, padded))[..., :features]


@cache
def stored_layout(size: int, channels: int, features: int, segments: int, runs: int) -> tuple[int, Layout]:
    """Return (4 or 8 bits, layout) of a weight of `size` bytes from `prepare_linear`; raises ValueError for others.

    runs: with multipliers their number, else 0.
    """
    for num_bits, half in ((4, HALF_RUN), (4, STEP)) if runs else ((4, HALF_RUN), (8, HALF_RUN)):
        shape = _layout(features // segments, segments, runs > 0, half)
        row = shape.stride * num_bits // 8 + segments * SUM_BYTES
        if size == channels * row and runs in (0, shape.stride // shape.run):
            return num_bits, shape
    raise ValueError(
        f"a weight of {size} bytes: no layout of {channels} x {features} in {segments} segments has that many"
    )
