"""A linear layer by one call of the compiled library; semantics: kernels/reference/linear.py."""

from functools import cache

import torch

from infoquant_vllm.format import hadamard_dense
from infoquant_vllm.kernels.cpu.library import operations


def prepare_matrices(matrices: list[torch.Tensor], hadamard: int) -> list[torch.Tensor]:
    """The matrices of an input transform, of a Hadamard its dense factor."""
    return [_dense(hadamard)] if hadamard else matrices


@cache
def _dense(size: int) -> torch.Tensor:
    return hadamard_dense(size).float().contiguous()


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
    """As the reference, bit by bit, on what the three `prepare_` functions make; matrices and clip contiguous."""
    grids = weight_scale, weight_zero
    return operations().linear(x, matrices, hadamard, clip, num_bits, symmetric, weight, *grids, bias)
