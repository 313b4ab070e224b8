"""Input transform and activation quantizer of the compiled library; semantics: kernels/reference."""

import torch

from infoquant_vllm.kernels.cpu.library import operations
from infoquant_vllm.kernels.cpu.linear import prepare_matrices


def rotate_quantize(
    x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int, clip: torch.Tensor, num_bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference, bit by bit; matrices and clip float32 and contiguous."""
    transform = prepare_matrices(matrices, hadamard), hadamard
    return operations().rotate_quantize(x, *transform, clip, num_bits, symmetric)


def rotate_quantize_wide(
    x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`wide_codes` of the reference behind the transform, bit by bit."""
    return operations().rotate_quantize_wide(x, prepare_matrices(matrices, hadamard), hadamard)


def rotate(x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int) -> torch.Tensor:
    """x [tokens, K] in any of the three dtypes through the input transform, in float32."""
    return operations().rotate(x, prepare_matrices(matrices, hadamard), hadamard)
