"""A linear layer: input transform, quantizer and product."""

import torch
import torch.nn.functional as F

from infoquant_vllm.kernels.reference.quantized_linear import quantized_linear
from infoquant_vllm.kernels.reference.rotate_quantize import rotate_quantize
from infoquant_vllm.kernels.reference.weight_only_linear import weight_only_linear


def prepare_weight(packed: torch.Tensor, num_bits: int, signed: bool, groups: int) -> torch.Tensor:
    """Checkpoint bytes [N, K * num_bits / 8], as they are; so are scales, zero points and matrices."""
    return packed


def prepare_grid(grid: torch.Tensor) -> torch.Tensor:
    """Scales or zero points [N, groups], as they are."""
    return grid


def prepare_matrices(matrices: list[torch.Tensor], hadamard: int) -> list[torch.Tensor]:
    """The input transform's matrices, as they are."""
    return matrices


def weight_rows(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    """Signed codes [..., features] int8 of some rows of an 8-bit weight [N, features]."""
    return F.embedding(rows, weight.view(torch.int8))


def linear(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    clip: torch.Tensor | None,
    num_bits: int,
    symmetric: bool,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [tokens, K] to [tokens, N] in the dtype of x.

    matrices, hadamard: the input transform, see `rotate`
    clip: [groups, 2] factors on the ranges of the input's groups, whose codes have `num_bits`; None: 16 bits
    weight, weight_scale, weight_zero: as in the checkpoint; weight_zero None: signed codes
    """
    if clip is None:
        return weight_only_linear(x, matrices, hadamard, weight, weight_scale, weight_zero, bias)
    codes = rotate_quantize(x, matrices, hadamard, clip, num_bits, symmetric)
    return quantized_linear(*codes, weight, weight_scale, weight_zero, bias, x.dtype)
