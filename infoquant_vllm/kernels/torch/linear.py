"""Quantized linear layers: exact int8 products by oneDNN, scaled in float32.

Weights stay packed. Codes are unpacked in every call into a scratch buffer that all layers share.
"""

import torch
import torch.nn.functional as F

from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.torch.quantize import QuantizedInput, rotate_quantize

_scratch = torch.empty(0, dtype=torch.int8)


def prepare_linear(weight: PackedWeight, num_bits: int, segments: int) -> PackedWeight:
    """Convert a checkpoint's weight to what `linear` reads: all but the codes stay.

    All codes become signed: unsigned ones lose 2^(bits-1). A 4-bit row holds feature j in the low and feature K/2 + j
    in the high nibble of byte j.
    """
    packed, signed = weight.packed, weight.zero_point is None
    if num_bits == 8:
        return weight._replace(packed=(packed if signed else packed ^ 0x80).view(torch.int8).contiguous())
    nibbles = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)  # [N, K] in order of K
    low, high = (nibbles if signed else nibbles ^ 8).chunk(2, dim=1)
    return weight._replace(packed=(low | (high << 4)).view(torch.int8).contiguous())


def prepare_matrices(matrices: list[torch.Tensor], hadamard: int) -> list[torch.Tensor]:
    """Return the matrices of an input transform unchanged."""
    return matrices


def weight_rows(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    """Return signed codes [..., features] int8 of some rows of an 8-bit weight from `prepare_linear`."""
    return F.embedding(rows, weight)


def linear(x: torch.Tensor, inputs: InputQuant, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply x [tokens, K] by a quantized weight [N, K]; return [tokens, N] in the dtype of x.

    int16 activations are multiplied as two 8-bit codes, high and low bytes, whose products are added in float32.
    """
    out = quantized_product(rotate_quantize(x, inputs), weight)
    if inputs.clip_ratio is None:
        high, low = out.unflatten(0, (-1, 2)).unbind(1)
        out = high + low
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def quantized_product(x: QuantizedInput, weight: PackedWeight) -> torch.Tensor:
    """Multiply activations [tokens, K] by a weight [N, K]: float32 [tokens, N].

    out[t, n] = weight.scale[n] * sum over segments s of x.scale[t, s] * (integer product within s). Integer products
    are exact. The order of the roundings is part of the definition, since last bits decide about later layers' codes:
    the integer product, times the activations' scale, the sum in order of K, at the end the weight's scale.
    An asymmetric 8-bit weight has 9 bits: its zero-point counts by the sum of the activations.
    """
    segments = x.scale.shape[1]
    integers, zero = _integer_weight(weight, x.values.shape[1])
    out: torch.Tensor | None = None
    parts = zip(x.values.chunk(segments, 1), integers.chunk(segments, 1), strict=True)
    for s, (values, part) in enumerate(parts):
        total = _int_matmul(values.contiguous(), part)
        offset = None if x.offset is None else x.offset[:, s, None]
        if offset is not None:
            total.sub_(offset * _row_sums(part))
        if zero is not None:
            total.sub_(_value_sums(values, offset) * zero)
        term = total.float().mul_(x.scale[:, s, None])
        out = term if out is None else out.add_(term)
    assert out is not None
    return out.mul_(weight.scale[:, 0])


def _integer_weight(weight: PackedWeight, features: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the integer weight int8 [N, K], and zero-points int32 [N] that are still to be subtracted, or None."""
    packed, _, multiplier, zero_point = weight
    if packed.shape[1] == features:
        return packed, None if zero_point is None else zero_point[:, 0].int() - 128
    unpacked = _unpack(packed)
    if zero_point is not None:
        _by_group(unpacked, zero_point).sub_((zero_point.int() - 8).to(torch.int8)[..., None])
    if multiplier is not None:
        _by_group(unpacked, multiplier).mul_(multiplier.view(torch.int8)[..., None])
    return unpacked, None


def _by_group(weight: torch.Tensor, qparams: torch.Tensor) -> torch.Tensor:
    return weight.view(*qparams.shape, -1)


def _unpack(weight: torch.Tensor) -> torch.Tensor:
    """Unpack [N, K/2] bytes to signed codes int8 [N, K]."""
    global _scratch  # noqa: PLW0603 (one buffer for all layers: a call's weights are dead when it returns)
    rows, half = weight.shape
    if _scratch.numel() < 2 * rows * half or _scratch.device != weight.device:
        with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
            _scratch = torch.empty(2 * rows * half, dtype=torch.int8, device=weight.device)
    unpacked = _scratch[: 2 * rows * half].view(rows, 2 * half)
    low, high = unpacked[:, :half], unpacked[:, half:]
    torch.bitwise_left_shift(weight, 4, out=low).bitwise_right_shift_(4)
    torch.bitwise_right_shift(weight, 4, out=high)
    return unpacked


def _row_sums(weight: torch.Tensor) -> torch.Tensor:
    """Sum rows of int8 [N, K] to int32 [1, N]; a product is faster than a sum."""
    return _int_matmul(weight.new_ones(1, weight.shape[1]), weight)


def _value_sums(values: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """Sum the values of each token less their offsets: int32 [tokens, 1]."""
    total = values.sum(1, keepdim=True, dtype=torch.int32)
    return total if offset is None else total - offset * values.shape[1]


def _int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply int8 a [M, K] and b [N, K] exactly: int32 [M, N]."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    return (a.double() @ b.double().t()).int()  # elsewhere _int_mm takes few shapes
