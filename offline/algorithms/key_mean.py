"""K smoothing: the mean key of each head, which is subtracted from every key before it is quantized.

Subtracting a constant from every key changes all scores of a query alike, which softmax does not see
(SageAttention, arXiv 2410.02367, section 4.2); the remaining keys span a smaller range. SageAttention takes
the mean of the sequence at hand. A cache that grows token by token needs a mean that is known beforehand.
"""

import torch


def mean_rotated_key(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the mean over all positions of a constant key [kv_heads, head_dim] after RoPE of its first features.

    Channels that RoPE rotates full circle within these positions average to zero: they have no common constant.

    cos, sin: [1, positions, rotary_dim], of RoPE
    """
    return rotate(key, cos[0].mean(0), sin[0].mean(0))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE at one position, cos and sin [rotary_dim], to the first features of x [..., head_dim]."""
    rotated, still = x.tensor_split([len(cos)], -1)
    first, second = rotated.chunk(2, -1)
    return torch.cat((rotated * cos + torch.cat((-second, first), -1) * sin, still), -1)
