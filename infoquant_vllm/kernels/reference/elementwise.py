"""RMS norm and SwiGLU's product, as the layers between the linears compute them.

Other layers' codes hang on last bits, so the order of sums and the make of exp must not show: both are in
float64 and rounded to float32 once, which leaves a difference in no more than a last bit in many millions.
"""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) over the last dimension, rounded to the dtype of x, times weight."""
    return _normal(x, epsilon).to(weight.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, which is not rounded to their dtype before it, and the sum, which is."""
    total = x.float() + residual.float()
    return _normal(total, epsilon).to(weight.dtype) * weight, total.to(x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for x [..., 2 * size], gate before up; silu rounded to the dtype of x."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate.double()).float().to(x.dtype) * up


def _normal(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).float()
