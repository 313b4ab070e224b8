"""Product with an unquantized matrix: of a few rows by the compiled library, of more by torch."""

import torch
import torch.nn.functional as F

from infoquant_vllm.kernels.cpu.library import operations

FEW_ROWS = 8
"""More than these are sooner multiplied by products of 16-bit floats, which torch has."""


def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As the reference, but for last bits."""
    if len(x) > FEW_ROWS or x.dtype == torch.float32 or not weight.is_contiguous():
        return F.linear(x, weight)
    return operations().few_rows_linear(x, weight)
