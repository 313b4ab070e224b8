"""Cross-layer equalization: move scales from one linear to another, which keeps the function and lowers the error.

Inputs x [tokens, K] that are rotated and then rounded get noise in proportion to |x|, the same in every
channel; after the weights W it is in proportion to |x| |W|. With x_j s_j and W_j / s_j in place of x_j and
W_j that product is smallest where s_j^2 = |W_j| / |x_j| (Cauchy and Schwarz).
"""

import torch

SMALLEST = 1e-6
"""Smallest norm, as a share of the largest: unused channels need no scale."""


def key_scales(
    queries: torch.Tensor, keys: torch.Tensor, kv_heads: int, head_dim: int, rotary_dim: int
) -> torch.Tensor:
    """Return the scales of keys [kv_heads, head_dim]; queries get the inverse.

    RoPE mixes channels i and i + rotary_dim / 2 of the first rotary_dim, so both get the same scale.

    queries, keys: second moments [heads * head_dim] of the channels before RoPE
    """

    def norms(moments: torch.Tensor) -> torch.Tensor:
        rotated, still = moments.view(kv_heads, -1, head_dim).sum(1).tensor_split([rotary_dim], -1)
        pairs = rotated.unflatten(-1, (2, -1)).sum(1).repeat(1, 2)
        return torch.cat((pairs, still), -1).sqrt()

    return _scales(norms(queries), norms(keys))


def down_scales(weight: torch.Tensor, second_moments: torch.Tensor) -> torch.Tensor:
    """Return the scales [K] of the inputs of down_proj; the columns of its weight [N, K] get the inverse.

    second_moments: [K], of the input channels, every token counting the same
    """
    return _scales(weight.norm(dim=0), second_moments.sqrt())


def output_moments(
    weight: torch.Tensor, bias: torch.Tensor | None, hessian: torch.Tensor, sums: torch.Tensor, tokens: float
) -> torch.Tensor:
    """Return the sums over tokens of the squared outputs of a linear [N, K], bias included: [N].

    hessian, sums: sums of x^T x [K, K] and of x [K] over its inputs x
    """
    moments = ((weight @ hessian) * weight).sum(1)
    if bias is not None:
        moments = moments + bias * (2 * (weight @ sums) + tokens * bias)
    return moments.clamp(min=0)


def normed_moments(moments: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Return second moments [heads, size] after an RMSNorm of `size` features, as if all its tokens were alike.

    moments: [heads * size], before the norm; gain: [size]
    """
    heads = moments.view(-1, len(gain))
    return heads / heads.mean(1, keepdim=True).clamp(min=1e-30) * gain.square()


def _scales(target: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """Return sqrt(target / current), with a geometric mean of 1 along the last axis."""
    target, current = (x.clamp(min=SMALLEST * x.max().item() + 1e-30) for x in (target, current))
    logarithm = (target / current).log() / 2
    return (logarithm - logarithm.mean(-1, keepdim=True)).exp()
