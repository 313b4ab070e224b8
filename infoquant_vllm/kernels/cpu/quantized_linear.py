"""Quantized linear of the compiled library: weights stay packed in memory and are unpacked in registers."""

import torch
import torch.nn.functional as F

from infoquant_vllm.kernels.cpu.library import DTYPES, operations

PANEL = 32  # channels
STEP = 4  # features


def prepare_weight(packed: torch.Tensor, num_bits: int, signed: bool, groups: int) -> torch.Tensor:
    """Checkpoint bytes [N, K * num_bits / 8] to lines [N / 32, K / 4, 16 * num_bits] uint8.

    A line holds four features of 32 channels, in unsigned codes (signed ones plus 2^(bits-1)): byte
    4c + j is feature j of channel c, with that of channel 16 + c in the high nibble or, at 8 bits, 64
    bytes further. Zeros fill N to a multiple of 32 and the features of each group to one of 4.
    """
    codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten(1) if num_bits == 4 else packed
    grouped = (codes ^ 2 ** (num_bits - 1) if signed else codes).view(len(codes), groups, -1)
    padded = F.pad(grouped, (0, -grouped.shape[2] % STEP, 0, 0, 0, -len(codes) % PANEL))
    lines = padded.view(len(padded) // PANEL, 2, PANEL // 2, -1, STEP).permute(0, 3, 1, 2, 4)
    return (lines[:, :, 0] | lines[:, :, 1] << 4 if num_bits == 4 else lines).flatten(2).contiguous()


def weight_rows(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    """Signed codes [..., features] int8 of some rows of an 8-bit weight, from `prepare_weight` with one group."""
    lines = weight.view(len(weight), -1, 2, PANEL // 2, STEP)
    panel, channel = rows // PANEL, rows % PANEL
    found = lines[panel, :, channel // (PANEL // 2), channel % (PANEL // 2)]
    return (found.flatten(-2)[..., :features] ^ 0x80).view(torch.int8)


def prepare_grid(grid: torch.Tensor) -> torch.Tensor:
    """Scales or zero points [N, groups], of that shape still, but a group's channels one after the other."""
    return grid.t().contiguous().t()


def quantized_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As the reference, on what `prepare_weight` and `prepare_grid` make."""
    grids = weight_scale, weight_zero
    return operations().quantized_linear(codes, scale, zero, weight, *grids, bias, num_bits, DTYPES[dtype])
