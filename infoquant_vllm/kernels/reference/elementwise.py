"""RMS norm, SwiGLU's product and RoPE, as the layers between the linears compute them.

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


def rotary_embedding(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, cos_sin: torch.Tensor, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE (Su et al., RoFormer, 2021) of query and key [tokens, heads * head_size] at positions [tokens] int64.

    cos_sin [positions, rotary_dim], cosines before sines, in the dtype of both. Of a head's first rotary_dim
    features i turns with i + rotary_dim / 2; the others stay. In float32, the product with the sine fused into the
    sum, as vLLM's operation for CPUs is compiled.
    """
    cos, sin = cos_sin[positions].float()[:, None].chunk(2, -1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second, rest = x.unflatten(-1, (-1, head_size)).split(
            (cos.shape[-1], cos.shape[-1], head_size - cos_sin.shape[1]), -1
        )
        a, b = first.float(), second.float()
        left = (a * cos).double() - b.double() * sin.double()  # float64 holds a product of float32 exactly
        right = (b * cos).double() + a.double() * sin.double()
        return torch.cat((left.float().to(x.dtype), right.float().to(x.dtype), rest), -1).flatten(-2)

    return turned(query), turned(key)


def _normal(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).float()
