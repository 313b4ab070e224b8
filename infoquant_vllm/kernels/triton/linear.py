"""A linear layer on a GPU: two kernels, the quantizer's and the product's; semantics: kernels/reference/linear.py."""

import torch

from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.triton.int4_linear import int4_linear
from infoquant_vllm.kernels.triton.rotate_quantize import prepare_matrices, rotate_quantize
from infoquant_vllm.kernels.triton.weights import prepare_grid, prepare_weight, stored_layout, weight_rows

__all__ = ["linear", "prepare_grid", "prepare_matrices", "prepare_weight", "weight_rows"]


def linear(x: torch.Tensor, inputs: InputQuant, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """As the reference, on what the three `prepare_` functions make.

    The same bits, but for what float32 products of input transforms with matrices round elsewhere (a code in some
    hundred thousand differs by one), and sums over groups of few tokens (see `int4_linear`).
    """
    matrices, hadamard, clip, num_bits, symmetric = inputs
    packed, weight_scale, weight_zero = weight
    features = x.shape[1]
    groups = max(1 if clip is None else len(clip), weight_scale.shape[1])
    _, shape = stored_layout(packed.numel(), len(weight_scale), features, groups)
    sum_groups = 0 if weight_zero is None else groups
    codes = rotate_quantize(x, matrices, hadamard, clip, num_bits, symmetric, shape.padded, sum_groups)
    return int4_linear(codes, features, packed, weight_scale, weight_zero, bias, x.dtype, pairs=clip is None)
