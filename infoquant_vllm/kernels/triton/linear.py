"""A linear layer on a GPU: two kernels, the quantizer's and the product's; semantics: kernels/reference/linear.py."""

import torch

from infoquant_vllm.kernels.triton.int4_linear import int4_linear
from infoquant_vllm.kernels.triton.rotate_quantize import prepare_matrices, rotate_quantize
from infoquant_vllm.kernels.triton.weights import prepare_grid, prepare_weight, stored_layout, weight_rows

__all__ = ["linear", "prepare_grid", "prepare_matrices", "prepare_weight", "weight_rows"]


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
    """As the reference, on what the three `prepare_` functions make.

    The same bits, but for what float32 products of input transforms with matrices round elsewhere (a code in some
    hundred thousand differs by one), and sums over groups of few tokens (see `int4_linear`).
    """
    features = x.shape[1]
    groups = max(1 if clip is None else len(clip), weight_scale.shape[1])
    _, shape = stored_layout(weight.numel(), len(weight_scale), features, groups)
    sum_groups = 0 if weight_zero is None else groups
    codes = rotate_quantize(x, matrices, hadamard, clip, num_bits, symmetric, shape.padded, sum_groups)
    return int4_linear(codes, features, weight, weight_scale, weight_zero, bias, x.dtype, pairs=clip is None)
