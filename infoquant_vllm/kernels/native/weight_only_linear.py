"""Linear of a 16-bit input by the compiled library; semantics: kernels/reference/weight_only_linear.py."""

import torch

from infoquant_vllm.kernels.native.quantized_linear import quantized_linear
from infoquant_vllm.kernels.native.rotate_quantize import rotate_quantize_wide
from infoquant_vllm.kernels.reference.weight_only_linear import add_bytes


def weight_only_linear(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As the reference, bit by bit, on what `prepare_weight` and `prepare_grid` make."""
    codes = rotate_quantize_wide(x, matrices, hadamard)
    products = quantized_linear(*codes, weight, weight_scale, weight_zero, None, 8, torch.float32)
    return add_bytes(products, bias, x.dtype)
