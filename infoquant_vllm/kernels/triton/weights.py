"""Weights as the Triton kernels read them: bytes, and sums of their codes."""

from functools import cache
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F

CHUNK = 128  # features of a row with one group that one run of bytes holds
STEP = 32  # features of the smallest product of the INT8 tensor cores
MAX_INT16_GROUP = {4: 4096, 8: 256}  # features, of which sums of codes surely fit in 16 bits


class Layout(NamedTuple):
    """How K features in so many groups lie in a row of weights, and the codes that meet them."""

    features: int
    group_size: int  # of the finer grouping; 0: one group
    chunk: int  # features of a run of bytes, at 4 bits the first half of them in the low nibbles
    padded: int  # features with the zeros behind them

    @property
    def groups(self) -> int:
        """Of the finer grouping."""
        return self.features // self.group_size if self.group_size else 1

    def block_k(self, largest: int) -> int:
        """Features of a step's product, at most so many."""
        return gcd(self.group_size or self.padded, largest)

    def steps(self, block_k: int) -> int:
        """Of the product's loop: blocks of features, or runs of one or two groups."""
        return self.padded // (self.chunk if self.group_size else block_k)


def layout(features: int, groups: int, num_bits: int) -> Layout:
    """The layout of a row; `groups` of the finer grouping.

    4-bit groups are read in pairs, one in the low and one in the high nibbles, so that of neither a part is wasted.
    """
    if features % groups or features // groups % STEP:
        raise ValueError(
            f"{groups} groups of {features} features: the Triton kernels need groups of multiples of {STEP}"
        )
    size = features // groups if groups > 1 else 0
    chunk = size * 8 // num_bits if size else CHUNK
    return Layout(features, size, chunk, -(-features // chunk) * chunk)


def prepare_weight(packed: torch.Tensor, num_bits: int, signed: bool, groups: int) -> torch.Tensor:
    """Checkpoint bytes [N, K * num_bits / 8] to this layout: flat uint8, rows of signed codes and then their sums.

    groups: of the finer grouping, of weights and activations. Unsigned codes lose 2^(bits-1), as their zero points
    must. Sums [groups, N] are int16 where any fits, else int32; they meet zero points of the inputs. Raises ValueError
    for channels that are no multiple of 16 and groups that are none of 32 features.
    """
    if len(packed) % 16:
        raise ValueError(f"{len(packed)} channels: the Triton kernels need a multiple of 16")
    codes = _signed_codes(packed, num_bits, signed)
    shape = layout(codes.shape[1], groups, num_bits)
    sums = (
        codes.view(len(codes), groups, -1).sum(-1, dtype=torch.int32).t().contiguous().to(sums_dtype(shape, num_bits))
    )
    rows = F.pad(codes, (0, shape.padded - shape.features))
    if num_bits == 4:
        low, high = (rows.view(len(rows), -1, 2, shape.chunk // 2) & 0xF).unbind(2)
        rows = (low | high << 4).flatten(1)
    return torch.cat((rows.flatten().view(torch.uint8), sums.flatten().view(torch.uint8)))


def prepare_grid(grid: torch.Tensor) -> torch.Tensor:
    """Scales or zero points [N, groups], of that shape still, but a group's channels one after the other."""
    return grid.t().contiguous().t()


def weight_rows(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    """Signed codes [..., features] int8 of some rows of an 8-bit weight, from `prepare_weight` with one group."""
    shape = layout(features, 1, 8)
    channels = weight.numel() // (shape.padded + sums_dtype(shape, 8).itemsize)
    table = weight[: channels * shape.padded].view(torch.int8).view(channels, shape.padded)
    return F.embedding(rows, table)[..., :features]


@cache
def stored_layout(size: int, channels: int, features: int, groups: int) -> tuple[int, Layout]:
    """(4 or 8 bits, layout) of a weight of `size` bytes from `prepare_weight`; raises ValueError where it is none."""
    for num_bits in (4, 8):
        shape = layout(features, groups, num_bits)
        row = shape.padded * num_bits // 8 + groups * sums_dtype(shape, num_bits).itemsize
        if size == channels * row:
            return num_bits, shape
    raise ValueError(f"a weight of {size} bytes is none of {channels} x {features} in {groups} groups")


def sums_dtype(shape: Layout, num_bits: int) -> torch.dtype:
    """Of the sums behind a weight's rows."""
    fits = (shape.group_size or shape.features) <= MAX_INT16_GROUP[num_bits]
    return torch.int16 if fits else torch.int32


def _signed_codes(packed: torch.Tensor, num_bits: int, signed: bool) -> torch.Tensor:
    if num_bits == 8:
        return (packed if signed else packed ^ 0x80).view(torch.int8)
    nibbles = torch.stack((packed & 0xF, packed >> 4), -1).flatten(1)
    return (nibbles ^ 8 if signed else nibbles).to(torch.int8) - 8
