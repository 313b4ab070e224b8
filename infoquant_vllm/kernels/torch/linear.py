"""A linear layer in torch, its products by oneDNN; semantics: kernels/reference/linear.py."""

import torch

from infoquant_vllm.kernels.torch.quantized_linear import quantized_linear
from infoquant_vllm.kernels.torch.rotate_quantize import rotate_quantize
from infoquant_vllm.kernels.torch.weight_only_linear import weight_only_linear


def prepare_matrices(matrices: list[torch.Tensor], hadamard: int) -> list[torch.Tensor]:
    """The matrices, as they are."""
    return matrices


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
    """As the reference, on a weight from `prepare_weight`."""
    if clip is None:
        return weight_only_linear(x, matrices, hadamard, weight, weight_scale, weight_zero, bias)
    codes = rotate_quantize(x, matrices, hadamard, clip, num_bits, symmetric)
    return quantized_linear(*codes, weight, weight_scale, weight_zero, bias, num_bits, x.dtype)
