"""RMSNorm, the products of gated MLPs and RoPE.

Activation codes of later layers depend on last bits, so neither the order of a sum nor the implementation of exp may
matter: both run in float64 and are rounded to float32 once. Implementations then differ in a last bit of about one
value in many millions.
"""

import math

import torch
import torch.nn.functional as F

GELU_CUBIC, GELU_SLOPE = 0.044715, 2 * math.sqrt(2 / math.pi)
"""Coefficients of GELU's approximation by tanh (Hendrycks and Gimpel, arXiv 1606.08415); the slope is of 2 u."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Round x / sqrt(mean(x^2) + epsilon) over the last dimension to the dtype of weight; multiply by weight.

    The product is rounded to the dtype of x; weight has that dtype or float32.
    """
    return (_normalize(x, epsilon).to(weight.dtype) * weight).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of x + residual (see `rms_norm`), and x + residual, which is rounded to the dtype of x."""
    total = x.float() + residual.float()
    return (_normalize(total, epsilon).to(weight.dtype) * weight).to(x.dtype), total.to(x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of x [..., 2 * size], which holds gate before up."""
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return gelu_tanh(gate) * up of x [..., 2 * size], which holds gate before up."""
    gate, up = x.chunk(2, -1)
    return gelu_tanh(gate) * up


def silu(x: torch.Tensor) -> torch.Tensor:
    """Return x * sigmoid(x), rounded to the dtype of x."""
    return F.silu(x.double()).float().to(x.dtype)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Return x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), rounded to the dtype of x.

    As x sigmoid(2 u): 1 + tanh u has no digits left where u is far below 0.
    """
    exact = x.double()
    return (exact * (GELU_SLOPE * (exact + GELU_CUBIC * exact**3)).sigmoid()).float().to(x.dtype)


def rotary_embedding(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, cos_sin: torch.Tensor, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply RoPE (Su et al., RoFormer, 2021) to query and key [tokens, heads * head_size] at positions [tokens] int64.

    cos_sin [positions, rotary_dim]: cosines before sines, in the dtype of query and key.
    """
    cos, sin = cos_sin[positions].float()[:, None].chunk(2, -1)
    rotated_query, rotated_key = (apply_rope(x.unflatten(-1, (-1, head_size)), cos, sin) for x in (query, key))
    return rotated_query.flatten(-2), rotated_key.flatten(-2)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads x [..., head_size] by cos, sin [..., rotary_dim / 2] float32, in the dtype of x.

    Feature i of the first rotary_dim pairs with i + rotary_dim / 2; later features stay. In float32, where the
    product with the sine is fused into the sum, as vLLM's operation for CPUs is compiled.
    """
    half = cos.shape[-1]
    first, second, unrotated = x.split((half, half, x.shape[-1] - 2 * half), -1)
    a, b = first.float(), second.float()
    left = (a * cos).double() - b.double() * sin.double()  # float64 holds a product of float32 exactly
    right = (b * cos).double() + a.double() * sin.double()
    return torch.cat((left.float().to(x.dtype), right.float().to(x.dtype), unrotated), -1)


def _normalize(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    exact = x.double()
    return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)).float()
