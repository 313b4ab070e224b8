"""The layout in which the Triton kernels read weights: packed rows, and behind them sums of their codes."""

from functools import cache
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F

RUN = 128  # features of a run of bytes in a row with one group
STEP = 32  # features of the smallest product of the INT8 tensor cores
MAX_INT16_GROUP = {4: 4096, 8: 256}  # features whose sum of codes surely fits in 16 bits


class Layout(NamedTuple):
    """Layout of K features in a row of weights, and in the rows of codes that meet them."""

    features: int
    group_size: int  # of the finer grouping of weights and inputs; 0: one group
    run: int  # features of a run of bytes, at 4 bits the first half of them in the low nibbles
    padded: int  # features with the zeros behind them

    @property
    def groups(self) -> int:
        """Groups of the finer grouping."""
        return self.features // self.group_size if self.group_size else 1

    def block_k(self, largest: int) -> int:
        """Return how many features a step multiplies, at most `largest`."""
        return gcd(self.group_size or self.padded, largest)

    def steps(self, block_k: int) -> int:
        """Count the steps of the main loop: blocks of features, or runs of one or two groups."""
        return self.padded // (self.run if self.group_size else block_k)


def layout(features: int, groups: int, num_bits: int) -> Layout:
    """Return the layout of a row with `groups` groups of the finer grouping.

    4-bit groups are read in pairs, one in the low and one in the high nibbles, so that every byte read is used. Raises
    ValueError for groups that are no multiple of 32 features.
    """
    if features % groups or features // groups % STEP:
        raise ValueError(
            f"{groups} groups of {features} features: the Triton kernels need groups of multiples of {STEP}"
        )
    size = features // groups if groups > 1 else 0
    run = size * 8 // num_bits if size else RUN
    return Layout(features, size, run, -(-features // run) * run)


def prepare_weight(packed: torch.Tensor, num_bits: int, signed: bool, groups: int) -> torch.Tensor:
    """Convert checkpoint bytes [N, K * num_bits / 8] to flat uint8: rows of signed codes, then sums of the codes.

    groups: of the finer grouping, of weights and activations. Unsigned codes lose 2^(bits-1), as their zero points
    must. Sums [groups, N] are int16 where any sum fits, else int32; they meet zero points of the inputs. Raises
    ValueError for channels that are no multiple of 16 and groups that are no multiple of 32 features.
    """
    if len(packed) % 16:
        raise ValueError(f"{len(packed)} channels: the Triton kernels need a multiple of 16")
    codes = _signed_codes(packed, num_bits, signed)
    shape = layout(codes.shape[1], groups, num_bits)
    sums = codes.view(len(codes), groups, -1).sum(-1, dtype=torch.int32).t().contiguous()
    rows = F.pad(codes, (0, shape.padded - shape.features))
    if num_bits == 4:
        low, high = (rows.view(len(rows), -1, 2, shape.run // 2) & 0xF).unbind(2)
        rows = (low | high << 4).flatten(1)
    sums = sums.to(sums_dtype(shape, num_bits))
    return torch.cat((rows.flatten().view(torch.uint8), sums.flatten().view(torch.uint8)))


def prepare_qparams(qparams: torch.Tensor) -> torch.Tensor:
    """Transpose the memory of scales or zero points [N, groups], so that channels of a group are contiguous."""
    return qparams.t().contiguous().t()


def weight_rows(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    """Return signed codes [..., features] int8 of some rows of an 8-bit weight from `prepare_weight` with one group."""
    shape = layout(features, 1, 8)
    channels = weight.numel() // (shape.padded + sums_dtype(shape, 8).itemsize)
    table = weight[: channels * shape.padded].view(torch.int8).view(channels, shape.padded)
    return F.embedding(rows, table)[..., :features]


@cache
def stored_layout(size: int, channels: int, features: int, groups: int) -> tuple[int, Layout]:
    """Return (4 or 8 bits, layout) of a weight of `size` bytes from `prepare_weight`; raises ValueError for others."""
    for num_bits in (4, 8):
        shape = layout(features, groups, num_bits)
        row = shape.padded * num_bits // 8 + groups * sums_dtype(shape, num_bits).itemsize
        if size == channels * row:
            return num_bits, shape
    raise ValueError(f"a weight of {size} bytes: no layout of {channels} x {features} in {groups} groups has that many")


def sums_dtype(shape: Layout, num_bits: int) -> torch.dtype:
    """Return the dtype of the sums behind a weight's rows."""
    fits = (shape.group_size or shape.features) <= MAX_INT16_GROUP[num_bits]
    return torch.int16 if fits else torch.int32


def _signed_codes(packed: torch.Tensor, num_bits: int, signed: bool) -> torch.Tensor:
    if num_bits == 8:
        return (packed if signed else packed ^ 0x80).view(torch.int8)
    nibbles = torch.stack((packed & 0xF, packed >> 4), -1).flatten(1)
    return (nibbles ^ 8 if signed else nibbles).to(torch.int8) - 8
