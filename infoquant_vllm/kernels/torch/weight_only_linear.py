"""Linear of a 16-bit input by oneDNN's int8 products; semantics: kernels/reference/weight_only_linear.py."""

import torch

from infoquant_vllm.kernels.reference.rotate_quantize import rotate
from infoquant_vllm.kernels.reference.weight_only_linear import add_bytes, wide_codes
from infoquant_vllm.kernels.torch.quantized_linear import quantized_linear


def weight_only_linear(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As the reference, on a weight from `prepare_weight`."""
    codes = wide_codes(rotate(x.float(), matrices, hadamard))
    products = quantized_linear(*codes, weight, weight_scale, weight_zero, None, 8, torch.float32)
    return add_bytes(products, bias, x.dtype)
