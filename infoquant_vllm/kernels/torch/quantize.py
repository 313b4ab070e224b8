"""Input transforms and quantizers of activations, keys and values, as the checkpoint format defines them.

Quantizers work in float32 and every operation rounds: a last bit decides about a code, and a code about all layers
after it. The order of the operations is part of the definition.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from infoquant_vllm.format import apply_hadamard
from infoquant_vllm.kernels.operands import InputQuant

MIN_SCALE = 1e-12
MIN_KV_SCALE = 2.0**-20
MAX_FLOAT16 = 65504.0
LARGEST_VALUE = 120.0
"""Integer of the largest code of a segment of several groups: 120 / 8 .. 120 / 15 times a code is never half-way
between two integers, as 127 / 8 * 4 is, where last bits would decide about the rounding."""


def apply_transform(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    hadamard_transform: Callable[[torch.Tensor], torch.Tensor] = apply_hadamard,
) -> torch.Tensor:
    """Apply the input transform of a linear to x [tokens, K] float32 (or float64); return the same dtype.

    - hadamard: size of the blocks of features that go through `hadamard_transform` (R4); 0: none
    - matrices: one [blocks, b, b], a matrix per block, or two whose Kronecker product is [K, K],
      applied one after the other; float32

    Products with matrices are summed in float64 and rounded once, so the order of a sum changes a last bit of about
    one value in many millions.
    """
    if hadamard:
        return hadamard_transform(x.unflatten(-1, (-1, hadamard))).flatten(-2)
    if not matrices:
        return x
    if matrices[0].dim() == 3:
        blocks = x.unflatten(-1, (len(matrices[0]), -1)).transpose(0, 1)
        return (blocks.double() @ matrices[0].double()).to(x.dtype).transpose(0, 1).flatten(1)
    left, right = (matrix.double() for matrix in matrices)
    y = (left.t() @ x.unflatten(-1, (len(left), -1)).double()).to(x.dtype)
    return (y.double() @ right).to(x.dtype).flatten(1)


class QuantizedInput(NamedTuple):
    """Activations as the integer products read them: x is about (values - offset) * scale.

    values: int8 [tokens, K]
    scale: float32 [tokens, segments], of consecutive segments of features of one size
    offset: int32 [tokens, segments], subtracted from the values, or None: nothing is
    """

    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None


class QuantizedGroups(NamedTuple):
    """Activations as integers, groups apart: x is about values * scale; all float32.

    values: integers [tokens, groups, group_size]
    zero: zero-points, integers [tokens, groups, 1]
    step: [tokens, groups, 1], what one code more is worth
    scale: [tokens, segments, 1]; the step where a segment is one group, else the groups of a segment share it
    """

    values: torch.Tensor
    zero: torch.Tensor
    step: torch.Tensor
    scale: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """Return the activations that the integers stand for, [tokens, groups, group_size] float32."""
        by_segment = self.values.unflatten(1, (self.scale.shape[1], -1))
        return (by_segment * self.scale[..., None]).flatten(1, 2)


def rotate_quantize(x: torch.Tensor, inputs: InputQuant) -> QuantizedInput:
    """Apply the input transform to x [tokens, K], subtract its mean, if given, and quantize it as `inputs` says.

    8-bit codes less their zero-points need 9 bits, so only 128 is subtracted from the codes, and the offset zero - 128
    is left. int16 activations become two rows of 8 bits.
    """
    y = apply_transform(x.float(), inputs.matrices, inputs.hadamard)
    y = y if inputs.mean is None else y - inputs.mean
    if inputs.clip_ratio is None:
        return quantize_int16(y)
    values, zero, _, scale = quantize_groups(y, inputs)
    offset = None
    if inputs.num_bits == 8:
        offset = (zero[..., 0] - 128).int()
        values.add_(zero - 128)
    return QuantizedInput(values.to(torch.int8).flatten(1), scale[..., 0].contiguous(), offset)


def quantize_groups(y: torch.Tensor, inputs: InputQuant) -> QuantizedGroups:
    """Quantize y [tokens, K] float32 per token and group; clip_ratio [groups, 2] scales each minimum and maximum.

    A value is multiplied by 1 / step, rounded, and not divided by the step. The integer of a code is its distance from
    the zero-point. If a segment has several groups, it is that distance in the segment's scale, of which the largest
    one of all groups takes 120: (code - zero) * (step / scale), rounded. That costs 1% to 2% more squared error than a
    float scale per group, and one integer product runs over the whole segment. Two-level scales as in VS-Quant (Dai et
    al., 2021, arXiv 2102.04503); integer multipliers, as there, would cost 12% to 17%, rounded up.
    """
    clip_ratio, num_bits, segments = inputs.clip_ratio, inputs.num_bits, inputs.segments
    assert clip_ratio is not None
    grouped = y.unflatten(-1, (len(clip_ratio), -1))
    qmax, half = 2**num_bits - 1, 2 ** (num_bits - 1)
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    low, high = low.clamp(max=0) * clip_ratio[:, :1], high.clamp(min=0) * clip_ratio[:, 1:]
    if inputs.symmetric:
        step = (torch.maximum(-low, high) / (half - 1)).clamp(min=MIN_SCALE)
        zero = torch.full_like(step, half)
    else:
        step = ((high - low) / qmax).clamp(min=MIN_SCALE)
        zero = torch.round(-low * (1 / step))
    values = (grouped * (1 / step)).round_().add_(zero).clamp_(0, qmax).sub_(zero)
    if segments == len(clip_ratio):
        return QuantizedGroups(values, zero, step, step)
    largest = step * torch.maximum(zero, qmax - zero)
    scale = largest.unflatten(1, (segments, -1)).amax(2) / LARGEST_VALUE
    ratio = step * (1 / scale).repeat_interleave(step.shape[1] // segments, 1)
    return QuantizedGroups(values.mul_(ratio).round_(), zero, step, scale)


def quantize_int16(y: torch.Tensor) -> QuantizedInput:
    """Quantize y [tokens, K] float32 per token to int16; return a row of high and a row of low bytes for each token.

    The largest magnitude of a token is 32767 steps: finer than bf16 holds it.
    """
    step = (y.abs().amax(1, keepdim=True) / 32767).clamp(min=MIN_SCALE)
    codes = torch.round(y * (1 / step)).int() + 32768
    scale = torch.stack((step * 256, step), 1)
    offset = torch.tensor([[0], [-128]], dtype=torch.int32, device=y.device).expand(len(y), 2, 1)
    byte_rows = torch.stack((codes >> 8, codes & 255), 1) - 128
    return QuantizedInput(byte_rows.flatten(0, 1).to(torch.int8), scale.flatten(0, 1), offset.flatten(0, 1))


def quantize_kv(
    x: torch.Tensor, clip_ratio: torch.Tensor, num_bits: int, feedback: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize heads x [..., head_size] float32; clip_ratio [..., 2] broadcasts and scales each minimum and maximum.

    Returns codes [..., head_size], float32 integers, and scales and zeros [...] float16: x is about
    code * scale + zero. With `feedback` see `round_with_feedback`.
    """
    qmax = 2**num_bits - 1
    low = x.amin(-1).clamp(max=0) * clip_ratio[..., 0]
    high = x.amax(-1).clamp(min=0) * clip_ratio[..., 1]
    scale = ((high - low) / qmax).clamp(MIN_KV_SCALE, MAX_FLOAT16).half()
    zero = low.clamp(-MAX_FLOAT16, MAX_FLOAT16).half()
    if feedback is not None:
        return round_with_feedback(x, scale, zero, feedback, qmax), scale, zero
    codes = ((x - zero.float()[..., None]) / scale.float()[..., None]).round_().clamp_(0, qmax)
    return codes, scale, zero


def round_with_feedback(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, feedback: torch.Tensor, largest_code: int
) -> torch.Tensor:
    """Round x [..., head_size] to codes, one feature after another, and add the error of each to those after it.

    The error of feature i times row i of `feedback` [..., head_size, head_size], which broadcasts, is added; of the
    row only entries after the diagonal matter. As GPTQ rounds weights (Frantar et al., arXiv 2210.17323).
    """
    left, scale, zero = x.clone(), scale.float()[..., None], zero.float()[..., None]
    codes = torch.empty_like(x)
    for i in range(x.shape[-1]):
        feature = left[..., i : i + 1]
        code = ((feature - zero) / scale).round_().clamp_(0, largest_code)
        codes[..., i : i + 1] = code
        error = feature - (code * scale + zero)
        left[..., i + 1 :] += error * feedback[..., i, i + 1 :]
    return codes
