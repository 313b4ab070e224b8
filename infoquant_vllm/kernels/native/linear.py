"""A linear layer by one call of the compiled library; semantics: kernels/reference/linear.py."""

from collections.abc import Callable
from functools import cache

import torch

from infoquant_vllm.kernels.native.library import DTYPES, POINTER, SIZE, function
from infoquant_vllm.kernels.native.rotate_quantize import INPUT, transform_arguments
from infoquant_vllm.kernels.native.weight_only_linear import weight_only_linear


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
    """As the reference, bit by bit, on what `prepare_weight` and `prepare_grid` make; matrices and clip contiguous."""
    if clip is None:
        return weight_only_linear(x, matrices, hadamard, weight, weight_scale, weight_zero, bias)
    x = x.contiguous()
    channels, weight_groups = weight_scale.shape
    out = torch.empty(len(x), channels, dtype=x.dtype)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    _linear()(
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.shape,
        *transform_arguments(matrices, hadamard),
        clip.data_ptr(),
        len(clip),
        num_bits,
        symmetric,
        weight.data_ptr(),
        weight_scale.data_ptr(),
        None if weight_zero is None else weight_zero.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        channels,
        weight_groups,
        weight.shape[2] // 16,
    )
    return out


@cache
def _linear() -> Callable[..., None]:
    return function("infoquant_linear", *INPUT, POINTER, SIZE, SIZE, SIZE, *[POINTER] * 5, SIZE, SIZE, SIZE)
