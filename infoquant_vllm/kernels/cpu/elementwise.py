"""RMS norm, SwiGLU's product and RoPE of the compiled library; semantics: kernels/reference/elementwise.py."""

import torch

from infoquant_vllm.kernels.cpu.library import operations


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """As the reference; the weight in the dtype of x."""
    return operations().rms_norm(x, weight, epsilon)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference; all in the dtype of x."""
    return operations().add_rms_norm(x, residual, weight, epsilon)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """As the reference."""
    return operations().silu_and_mul(x)


def rotary_embedding(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, cos_sin: torch.Tensor, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference; rows may lie apart."""
    return operations().rotary_embedding(positions, query, key, cos_sin, head_size)
