"""A linear layer in Triton; semantics: kernels/reference/linear.py."""

import torch

from infoquant_vllm.kernels.reference.linear import prepare_grid, prepare_matrices, prepare_weight
from infoquant_vllm.kernels.triton.int4_linear import quantized_linear
from infoquant_vllm.kernels.triton.rotate_quantize import rotate_quantize

__all__ = ["linear", "prepare_grid", "prepare_matrices", "prepare_weight"]


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
    """As the reference, of 4-bit and 8-bit inputs; raises NotImplementedError for those of 16 bits (clip None)."""
    if clip is None:
        raise NotImplementedError("infoquant: input_bits 16: no Triton kernel serves them")
    codes = rotate_quantize(x, matrices, hadamard, clip, num_bits, symmetric)
    return quantized_linear(*codes, weight, weight_scale, weight_zero, bias, x.dtype)
