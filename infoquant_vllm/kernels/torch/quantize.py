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
MAX_VALUE = 127.0
"""Largest magnitude of a code less its zero-point, times its multiplier: an int8 value."""


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
    """Codes of activations: x is about (codes - zero) * multiplier * scale; all float32, all but `scale` integers.

    codes: [tokens, groups, group_size]
    zero, multiplier, scale: [tokens, groups, 1]; the groups of a segment share their scale
    """

    codes: torch.Tensor
    zero: torch.Tensor
    multiplier: torch.Tensor
    scale: torch.Tensor

    def values(self) -> torch.Tensor:
        """Return the dequantized activations [tokens, groups, group_size] float32."""
        return (self.codes - self.zero).mul_(self.multiplier).mul_(self.scale)


def rotate_quantize(x: torch.Tensor, inputs: InputQuant) -> QuantizedInput:
    """Apply the input transform to x [tokens, K], then quantize it as `inputs` says.

    4-bit codes less their zero-points, times their multipliers, lie within -127 .. 127. 8-bit ones need 9 bits, so only
    128 is subtracted from the codes, and the offset zero - 128 is left. int16 activations become two rows of 8 bits.
    """
    y = apply_transform(x.float(), inputs.matrices, inputs.hadamard)
    if inputs.clip_ratio is None:
        return quantize_int16(y)
    codes, zero, multiplier, scale = quantize_groups(y, inputs)
    scale = scale.flatten(1)[:, :: len(inputs.clip_ratio) // inputs.segments].contiguous()
    if inputs.num_bits == 8:
        return QuantizedInput((codes - 128).to(torch.int8).flatten(1), scale, (zero - 128).flatten(1).int())
    return QuantizedInput(((codes - zero) * multiplier).to(torch.int8).flatten(1), scale, None)


def quantize_groups(y: torch.Tensor, inputs: InputQuant) -> QuantizedGroups:
    """Quantize y [tokens, K] float32 per token and group; clip_ratio [groups, 2] scales each minimum and maximum.

    A value is multiplied by 1 / step, rounded, and not divided by the step. Where a segment has several groups, its
    groups share one float scale, and each has a small integer as multiplier (see `two_level_scales`).
    """
    clip_ratio, num_bits = inputs.clip_ratio, inputs.num_bits
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
    if inputs.segments == len(clip_ratio):
        codes = (grouped * (1 / step)).round_().add_(zero).clamp_(0, qmax)
        return QuantizedGroups(codes, zero, torch.ones_like(step), step)
    scale, multiplier = two_level_scales(step, torch.maximum(zero, qmax - zero), inputs.segments)
    step = scale * multiplier
    if not inputs.symmetric:
        zero = torch.round(-low * (1 / step)).clamp_(max=qmax)
    reach = torch.floor(MAX_VALUE / multiplier)
    codes = (grouped * (1 / step)).round_().clamp_(-reach, reach).add_(zero).clamp_(0, qmax)
    return QuantizedGroups(codes, zero, multiplier, scale)


def two_level_scales(step: torch.Tensor, reach: torch.Tensor, segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split steps [tokens, groups, 1] into a scale that the groups of a segment share and integer multipliers.

    reach: [tokens, groups, 1], largest distance of a code from its zero-point; times the multiplier it is at most 127.
    Multipliers are rounded up, so that hardly a range shrinks. Per-vector scales of VS-Quant (Dai et al., 2021,
    arXiv 2102.04503), with the int8 range of QServe's progressive groups (Lin et al., 2024, arXiv 2405.04532).
    Returns scale and multiplier [tokens, groups, 1].
    """
    groups = step.shape[1]
    needed = (step * reach).view(len(step), segments, -1).amax(-1, keepdim=True) / MAX_VALUE
    scale = needed.expand(-1, -1, groups // segments).reshape(step.shape)
    multiplier = torch.minimum(torch.ceil(step / scale), torch.floor(MAX_VALUE / reach)).clamp_(min=1)
    return scale, multiplier


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
    x: torch.Tensor, clip_ratio: torch.Tensor, num_bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize heads x [..., head_size] float32; clip_ratio [..., 2] broadcasts and scales each minimum and maximum.

    Returns codes [..., head_size], float32 integers, and scales and zeros [...] float16: x is about
    code * scale + zero.
    """
    qmax = 2**num_bits - 1
    low = x.amin(-1).clamp(max=0) * clip_ratio[..., 0]
    high = x.amax(-1).clamp(min=0) * clip_ratio[..., 1]
    scale = ((high - low) / qmax).clamp(MIN_KV_SCALE, MAX_FLOAT16).half()
    zero = low.clamp(-MAX_FLOAT16, MAX_FLOAT16).half()
    codes = ((x - zero.float()[..., None]) / scale.float()[..., None]).round_().clamp_(0, qmax)
    return codes, scale, zero
