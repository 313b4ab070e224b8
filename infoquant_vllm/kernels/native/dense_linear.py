"""Product with an unquantised matrix: of a few rows by the compiled library, of more by torch."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from infoquant_vllm.kernels.native.library import DTYPES, POINTER, SIZE, function

FEW_ROWS = 8
"""More than these are sooner multiplied by products of 16-bit floats, which torch has."""


def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As the reference, but for last bits."""
    if len(x) > FEW_ROWS or x.dtype == torch.float32 or not weight.is_contiguous():
        return F.linear(x, weight)
    x = x.contiguous()
    channels, features = weight.shape
    out = torch.empty(len(x), channels, dtype=x.dtype)
    sizes = (DTYPES[x.dtype], len(x), features, channels)
    _dense_linear()(x.data_ptr(), weight.data_ptr(), *sizes, out.data_ptr())
    return out


@cache
def _dense_linear() -> Callable[..., None]:
    return function("infoquant_dense_linear", POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, POINTER)
