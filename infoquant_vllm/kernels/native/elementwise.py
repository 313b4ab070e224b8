"""RMS norm and SwiGLU's product of the compiled library; semantics: kernels/reference/elementwise.py."""

from collections.abc import Callable
from functools import cache

import torch

from infoquant_vllm.kernels.native.library import DOUBLE, DTYPES, POINTER, SIZE, function


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """As the reference; the weight in the dtype of x."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    tokens = x.numel() // size
    _rms_norm()(x.data_ptr(), None, weight.data_ptr(), DTYPES[x.dtype], tokens, size, epsilon, y.data_ptr(), None)
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference; all in the dtype of x."""
    x, residual = x.contiguous(), residual.contiguous()
    y, total, size = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    tokens = x.numel() // size
    inputs = x.data_ptr(), residual.data_ptr(), weight.data_ptr()
    _rms_norm()(*inputs, DTYPES[x.dtype], tokens, size, epsilon, y.data_ptr(), total.data_ptr())
    return y, total


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """As the reference."""
    x = x.contiguous()
    size = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], size))
    _silu_and_mul()(x.data_ptr(), DTYPES[x.dtype], x.numel() // (2 * size), size, out.data_ptr())
    return out


@cache
def _rms_norm() -> Callable[..., None]:
    return function("infoquant_rms_norm", *[POINTER] * 3, SIZE, SIZE, SIZE, DOUBLE, POINTER, POINTER)


@cache
def _silu_and_mul() -> Callable[..., None]:
    return function("infoquant_silu_and_mul", POINTER, SIZE, SIZE, SIZE, POINTER)
