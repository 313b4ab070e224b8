"""The quantizers of `simulated`, differentiable: rounding passes gradients as if it did nothing.

Straight-through estimation (Bengio et al., arXiv 1308.3432), with the gradient of the step, as in LSQ
(Esser et al., arXiv 1902.08153): a step is a clipped range / levels, so it depends on the clip
factors. Zero points and the extremes that a range is made of count as constants.
"""

from typing import Any

import torch
from torch.autograd import Function

from infoquant_vllm.format import ActivationArgs
from offline.evaluate.simulated import LARGEST_HALF, SMALLEST_CACHE_SCALE, quantize_input, store_and_load

HALF_STEP = 0.5001
"""Steps: what rounding alone moves a value by at most, with room for float32; clipping moves it further."""

Pair = tuple[torch.Tensor, torch.Tensor]


def fake_quantize(x: torch.Tensor, clip: torch.Tensor, num_bits: int, symmetric: bool) -> torch.Tensor:
    """x [..., K] float32 through activation codes and back; the values are those of `quantize_input`.

    clip: [groups, 2] float32, factors on a group's (minimum, maximum)
    Gradients go to x and clip.
    """
    return _FakeQuantize.apply(x, clip, num_bits, symmetric)


def fake_store(x: torch.Tensor, clip: torch.Tensor, num_bits: int) -> torch.Tensor:
    """x [..., kv_heads, tokens, head_size] float32 through cache codes and back, as `store_and_load`.

    clip: [kv_heads, 2] float32, factors on a head's (minimum, maximum)
    Gradients go to x and clip.
    """
    return _FakeStore.apply(x, clip, num_bits)


class _FakeQuantize(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clip: torch.Tensor, num_bits: int, symmetric: bool) -> torch.Tensor:
        args = ActivationArgs(num_bits=num_bits, symmetric=symmetric)  # type: ignore[arg-type]
        codes, scale = quantize_input(x.flatten(0, -2), args, clip)
        y = codes.unflatten(1, (len(clip), -1)).mul_(scale[..., None]).view(x.shape)
        ctx.save_for_backward(x, y, scale[..., None], clip)
        ctx.num_bits, ctx.symmetric = num_bits, symmetric
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, clip = ctx.saved_tensors[2:]
        x, y, gradient = (
            t.reshape(-1, len(clip), t.shape[-1] // len(clip)) for t in (*ctx.saved_tensors[:2], *gradients)
        )
        to_x = _where_not_clipped(gradient, x, y, scale)
        to_scale = (torch.linalg.vecdot(gradient, y) - torch.linalg.vecdot(to_x, x)) / scale[..., 0]
        smallest, largest = _ends(x)
        if ctx.symmetric:
            steps = 2 ** (ctx.num_bits - 1) - 1
            below = -smallest * clip[:, 0] > largest * clip[:, 1]
            to_low, to_high = -to_scale * below / steps, to_scale * ~below / steps
        else:
            to_low, to_high = -to_scale / (2**ctx.num_bits - 1), to_scale / (2**ctx.num_bits - 1)
        to_clip = torch.stack((to_low * smallest, to_high * largest), -1).sum(0)
        return to_x.view(ctx.saved_tensors[0].shape), to_clip, None, None


class _FakeStore(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clip: torch.Tensor, num_bits: int) -> torch.Tensor:
        y = store_and_load(x, num_bits, clip)
        ctx.save_for_backward(x, y, clip)
        ctx.levels = 2**num_bits - 1
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, y, clip), (gradient,) = ctx.saved_tensors, gradients
        smallest, largest = _ends(x)
        low, high = smallest * clip[:, :1], largest * clip[:, 1:]
        scale = ((high - low) / ctx.levels).clamp(SMALLEST_CACHE_SCALE, LARGEST_HALF).half().float()[..., None]
        low = low.clamp(min=-LARGEST_HALF).half().float()[..., None]
        to_x = _where_not_clipped(gradient, x, y, scale)
        to_scale = (torch.linalg.vecdot(gradient, y - low) - torch.linalg.vecdot(to_x, x - low)) / scale[..., 0]
        to_high = to_scale / ctx.levels
        to_low = (gradient - to_x).sum(-1) - to_high
        to_clip = torch.stack((to_low * smallest, to_high * largest), -1)
        return to_x, to_clip.sum(-2).view(-1, len(clip), 2).sum(0), None


def _where_not_clipped(gradient: torch.Tensor, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return gradient.masked_fill((y - x).abs_() > HALF_STEP * scale, 0)


def _ends(x: torch.Tensor) -> Pair:
    """The extremes of x [..., K] that ranges are made of, 0 among them: [...] each."""
    smallest, largest = torch.aminmax(x, dim=-1)
    return smallest.clamp_(max=0), largest.clamp_(min=0)
