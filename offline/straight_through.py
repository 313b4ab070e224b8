"""The quantisers of `simulated`, differentiable: rounding passes gradients as if it did nothing.

Straight-through estimation (Bengio et al., arXiv 1308.3432), with the gradient of the range as well:
a step is a clipped range / levels, so it depends on the clip factors and on the extreme inputs.
Zero points count as constants.
"""

from typing import Any

import torch
from torch.autograd import Function

from infoquant_vllm.format import ActivationArgs
from offline.simulated import LARGEST_HALF, SMALLEST_CACHE_SCALE, quantize_input, store_and_load


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
        ctx.save_for_backward(x, clip, scale)
        ctx.num_bits, ctx.symmetric = num_bits, symmetric
        return (codes.unflatten(1, (len(clip), -1)) * scale[..., None]).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, clip, scale = ctx.saved_tensors
        grouped, scale = x.view(-1, len(clip), x.shape[-1] // len(clip)), scale[..., None]
        gradient = gradients[0].reshape(grouped.shape)
        low, high = _extremes(grouped)
        half, levels = 2 ** (ctx.num_bits - 1), 2**ctx.num_bits - 1
        zero = torch.full_like(scale, half) if ctx.symmetric else torch.round(-low * clip[:, :1] / scale)
        exact = grouped / scale
        codes = torch.round(exact) + zero
        inside = (codes >= 0) & (codes <= levels)
        step = ((codes.clamp_(0, levels) - zero - exact * inside) * gradient).sum(-1, keepdim=True)
        if ctx.symmetric:
            below = -low * clip[:, :1] > high * clip[:, 1:]
            to_low, to_high = -step * below / (half - 1), step * ~below / (half - 1)
        else:
            to_low, to_high = -step / levels, step / levels
        to_clip = torch.cat((to_low * low, to_high * high), -1).sum(0)
        to_x = _to_extremes(gradient * inside, grouped, to_low * clip[:, :1], to_high * clip[:, 1:])
        return to_x.view(x.shape), to_clip, None, None


class _FakeStore(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clip: torch.Tensor, num_bits: int) -> torch.Tensor:
        ctx.save_for_backward(x, clip)
        ctx.num_bits = num_bits
        return store_and_load(x, num_bits, clip)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, clip = ctx.saved_tensors
        gradient, levels = gradients[0], 2**ctx.num_bits - 1
        low, high = _extremes(x)
        low_clip, high_clip = clip[:, :1, None], clip[:, 1:, None]
        step = ((high * high_clip - low * low_clip) / levels).clamp(SMALLEST_CACHE_SCALE, LARGEST_HALF).half().float()
        exact = (x - (low * low_clip).clamp(min=-LARGEST_HALF).half().float()) / step
        codes = torch.round(exact)
        inside = (codes >= 0) & (codes <= levels)
        to_step = ((codes.clamp_(0, levels) - exact * inside) * gradient).sum(-1, keepdim=True)
        to_high = to_step / levels
        to_low = (gradient * ~inside).sum(-1, keepdim=True) - to_high
        to_clip = torch.cat((to_low * low, to_high * high), -1).sum(-2).view(-1, len(clip), 2).sum(0)
        to_x = _to_extremes(gradient * inside, x, to_low * low_clip, to_high * high_clip)
        return to_x, to_clip, None


def _extremes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of the range that the codes span before it is clipped, over the last axis, which stays."""
    return x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)


def _to_extremes(to_x: torch.Tensor, x: torch.Tensor, to_low: torch.Tensor, to_high: torch.Tensor) -> torch.Tensor:
    """Add the gradients of the range's ends to those of the inputs that they are, where these are not 0 itself."""
    for at, gradient, sign in ((x.argmin(-1, True), to_low, -1), (x.argmax(-1, True), to_high, 1)):
        to_x.scatter_add_(-1, at, gradient * (x.gather(-1, at) * sign > 0))
    return to_x
