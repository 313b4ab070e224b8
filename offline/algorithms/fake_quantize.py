"""Fake quantization: the values that codes stand for, of weights and, with gradients, of activations and KV.

Rounding passes gradients unchanged, a straight-through estimator (Bengio et al., arXiv 1308.3432). Scales have the
gradient of LSQ (Esser et al., arXiv 1902.08153): a step is a clipped range / levels, so it depends on the clip
ratios. Zero-points, the minimum and maximum of a range, and the scale that groups share count as constants.
"""

from typing import Any

import torch
from torch.autograd import Function

from infoquant_vllm.format import ActivationArgs, WeightArgs, activation_segments, unpack_codes
from infoquant_vllm.kernels.operands import InputQuant
from infoquant_vllm.kernels.torch.quantize import quantize_groups, quantize_kv

MAX_ROUNDING = 0.5001
"""Steps; rounding moves a value by no more (with room for float32), clipping moves it further."""

Pair = tuple[torch.Tensor, torch.Tensor]


def integer_weights(tensors: dict[str, torch.Tensor], args: WeightArgs) -> torch.Tensor:
    """Subtract zero-points from the codes of a linear's checkpoint tensors, and multiply by multipliers.

    Returns [N, K]: int8, or int16 for asymmetric 8-bit codes.
    """
    codes = unpack_codes(tensors["weight_packed"], args.num_bits, signed=args.symmetric)
    integers = codes.to(torch.int16)
    for name, apply in (("weight_zero_point", torch.sub), ("weight_multiplier", torch.mul)):
        if name in tensors:
            by_group = integers.unflatten(1, (tensors[name].shape[1], -1))
            integers = apply(by_group, tensors[name].to(torch.int16)[:, :, None]).flatten(1)
    return integers if args.num_bits == 8 and not args.symmetric else integers.to(torch.int8)


def dequantized_weight(tensors: dict[str, torch.Tensor], args: WeightArgs) -> torch.Tensor:
    """Dequantize a linear's checkpoint tensors to [N, K] float32."""
    return integer_weights(tensors, args) * tensors["weight_scale"]


def added_to_product(tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return what a linear adds to its product [N]: the bias, the output for the mean input, or their sum."""
    mean, bias = tensors.get("output_mean"), tensors.get("bias")
    return bias if mean is None else mean if bias is None else mean + bias.float()


def input_quant(args: ActivationArgs, clip: torch.Tensor | None, features: int) -> InputQuant:
    """Return the quantizer of inputs of `features`, without transform and mean; clip: ratios [groups, 2], or None."""
    return InputQuant([], 0, clip, args.num_bits, args.symmetric, activation_segments(args, features))


def fake_quantize(x: torch.Tensor, clip: torch.Tensor, args: ActivationArgs) -> torch.Tensor:
    """Quantize activations x [..., K] float32 as `quantize_groups` does and dequantize them.

    clip: clip ratios [groups, 2] float32 of (minimum, maximum)
    Gradients go to x and clip.
    """
    return _FakeQuantize.apply(x, clip, args)


def fake_store(
    x: torch.Tensor, clip: torch.Tensor, num_bits: int, feedback: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantize keys or values x [..., kv_heads, tokens, head_size] float32 as `quantize_kv` does and dequantize them.

    clip: clip ratios [kv_heads, 2] float32 of (minimum, maximum)
    feedback: [kv_heads, head_size, head_size], of the errors of keys (see `round_with_feedback`)
    Gradients go to x and clip; they take codes as they are, with feedback too.
    """
    return _FakeStore.apply(x, clip, num_bits, feedback)


class _FakeQuantize(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clip: torch.Tensor, args: ActivationArgs) -> torch.Tensor:
        quantized = quantize_groups(x.flatten(0, -2), input_quant(args, clip, x.shape[-1]))
        ctx.save_for_backward(x, quantized.step, quantized.zero, clip)
        ctx.num_bits, ctx.symmetric = args.num_bits, args.symmetric
        return quantized.dequantized().view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        step, zero, clip = ctx.saved_tensors[1:]
        x, gradient = (t.reshape(*step.shape[:2], -1) for t in (ctx.saved_tensors[0], *gradients))
        scaled, levels = x * (1 / step), 2**ctx.num_bits - 1
        rounded = scaled.round()
        integers = torch.clamp(rounded, -zero, levels - zero)
        to_x = gradient.masked_fill(integers != rounded, 0)
        to_step = torch.linalg.vecdot(gradient, integers) - torch.linalg.vecdot(to_x, scaled)
        smallest, largest = _range(x)
        if ctx.symmetric:
            steps = 2 ** (ctx.num_bits - 1) - 1
            below = -smallest * clip[:, 0] > largest * clip[:, 1]
            to_low, to_high = -to_step * below / steps, to_step * ~below / steps
        else:
            to_low, to_high = -to_step / levels, to_step / levels
        to_clip = torch.stack((to_low * smallest, to_high * largest), -1).sum(0)
        return to_x.view(ctx.saved_tensors[0].shape), to_clip, None


class _FakeStore(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, clip: torch.Tensor, num_bits: int, feedback: torch.Tensor | None
    ) -> torch.Tensor:
        shared = None if feedback is None else feedback[:, None]
        codes, scale, zero = quantize_kv(x, clip[:, None], num_bits, shared)
        y = codes.mul_(scale.float()[..., None]).add_(zero.float()[..., None])
        ctx.save_for_backward(x, y, scale, zero, clip)
        ctx.levels = 2**num_bits - 1
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, y, scale, zero, clip), (gradient,) = ctx.saved_tensors, gradients
        scale, zero = scale.float()[..., None], zero.float()[..., None]
        smallest, largest = _range(x)
        to_x = _where_not_clipped(gradient, (x - zero) / scale, ctx.levels)
        to_scale = (torch.linalg.vecdot(gradient, y - zero) - torch.linalg.vecdot(to_x, x - zero)) / scale[..., 0]
        to_high = to_scale / ctx.levels
        to_low = (gradient - to_x).sum(-1) - to_high
        to_clip = torch.stack((to_low * smallest, to_high * largest), -1)
        return to_x, to_clip.sum(-2).view(-1, len(clip), 2).sum(0), None, None


def _where_not_clipped(gradient: torch.Tensor, scaled: torch.Tensor, levels: int) -> torch.Tensor:
    """Return the gradient of entries `scaled` that lie between the codes 0 and `levels`, and 0 elsewhere."""
    return gradient.masked_fill((scaled < -MAX_ROUNDING) | (scaled > levels + MAX_ROUNDING), 0)


def _range(x: torch.Tensor) -> Pair:
    """Return the minimum and maximum of x [..., K] and 0: [...] each."""
    smallest, largest = torch.aminmax(x, dim=-1)
    return smallest.clamp_(max=0), largest.clamp_(min=0)
