"""A linear layer: input transform, quantiser and product."""

import torch

from infoquant_vllm.kernels.reference.quantized_linear import quantized_linear
from infoquant_vllm.kernels.reference.rotate_quantize import rotate_quantize
from infoquant_vllm.kernels.reference.weight_only_linear import weight_only_linear


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
