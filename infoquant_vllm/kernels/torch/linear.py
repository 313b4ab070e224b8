"""Quantized linear layers: exact int8 products by oneDNN, scaled in float32.

Weights stay packed. 4-bit codes are unpacked in every call into a scratch buffer that all layers share, by one shift
and one mask per byte. Unpacked codes are multiplied by 16, since a signed nibble in the high half of an int8 needs no
sign extension; the result is divided by 16.
"""

import torch
import torch.nn.functional as F

from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.torch.quantize import apply_transform, quantize_int16, rotate_quantize

UNPACKED_FACTOR = 16
EXPAND_ROWS = 64  # most rows of a product that has the groups as rows

_scratch = torch.empty(0, dtype=torch.int8)


def prepare_weight(packed: torch.Tensor, num_bits: int, signed: bool, groups: int = 1) -> torch.Tensor:
    """Convert checkpoint bytes [N, K * num_bits / 8] to the layout of this kernel, for any number of groups.

    All codes become signed: unsigned ones and their zero-points lose 2^(bits-1). A 4-bit row holds feature j in the
    low and feature K/2 + j in the high nibble of byte j.
    """
    if num_bits == 8:
        return (packed if signed else packed ^ 0x80).view(torch.int8).contiguous()
    nibbles = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)  # [N, K] in order of K
    low, high = (nibbles if signed else nibbles ^ 8).chunk(2, dim=1)
    return (low | (high << 4)).view(torch.int8).contiguous()


def prepare_qparams(qparams: torch.Tensor) -> torch.Tensor:
    """Return scales or zero-points [N, groups] unchanged."""
    return qparams


def prepare_matrices(matrices: list[torch.Tensor], hadamard: int) -> list[torch.Tensor]:
    """Return the matrices of an input transform unchanged."""
    return matrices


def weight_rows(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    """Return signed codes [..., features] int8 of some rows of an 8-bit weight from `prepare_weight`."""
    return F.embedding(rows, weight)


def linear(x: torch.Tensor, inputs: InputQuant, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply x [tokens, K] by a quantized weight [N, K]; return [tokens, N] in the dtype of x.

    Codes of the weight are laid out by `prepare_weight`; its scales and zero-points are those of the checkpoint.
    int16 activations are multiplied as two 8-bit codes, high and low bytes, whose products are added in float32.
    """
    matrices, hadamard, clip, num_bits, symmetric = inputs
    if clip is None:
        codes = quantize_int16(apply_transform(x.float(), matrices, hadamard))
        high, low = quantized_product(*codes, 8, *weight).unflatten(0, (-1, 2)).unbind(1)
        out = high + low
    else:
        codes = rotate_quantize(x, matrices, hadamard, clip, num_bits, symmetric)
        out = quantized_product(*codes, num_bits, *weight)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


def quantized_product(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    num_bits: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
) -> torch.Tensor:
    """Return out[t, n] = sum_g scale[t, g] * weight_scale[n, g] * (integer product within g), float32 [tokens, N].

    codes [tokens, K] uint8 have `num_bits`, scale float32 and zero int32 [tokens, Ga]; weight comes from
    `prepare_weight`, with weight_scale and weight_zero [N, Gw] (None: signed codes). Integer products are exact. They
    are scaled and summed in float32 over the finer of both groupings, in order of K. The order of the roundings is
    part of the definition, since last bits decide about later layers' codes: a group's weight scale, its activation
    scale, the sum, and at the end a channel's weight scale.
    """
    features = codes.shape[1]
    factor = 1 if weight.shape[1] == features else UNPACKED_FACTOR
    unpacked = weight if factor == 1 else _unpack(weight)
    groups = max(scale.shape[1], weight_scale.shape[1])
    centered, zero_offset = _center(codes, zero, num_bits)
    out: torch.Tensor | None = None
    for g, total in enumerate(_group_products(centered, unpacked, groups)):
        part = slice(g * features // groups, (g + 1) * features // groups)
        a, w = g * scale.shape[1] // groups, g * weight_scale.shape[1] // groups
        offset = None if zero_offset is None else zero_offset[:, a, None]
        if offset is not None:
            total.sub_(offset * _row_sums(unpacked[:, part]))
        if weight_zero is not None:
            signed_zero = weight_zero[:, w].int() - (8 if factor == UNPACKED_FACTOR else 128)
            total.sub_(_code_sums(centered[:, part], offset) * (signed_zero * factor))
        term = total.float()
        if weight_scale.shape[1] > 1:
            term.mul_(weight_scale[:, w])
        term.mul_(scale[:, a, None])
        out = term if out is None else out.add_(term)
    assert out is not None
    if weight_scale.shape[1] == 1:
        out.mul_(weight_scale[:, 0])
    return out if factor == 1 else out.div_(factor)


def _unpack(weight: torch.Tensor) -> torch.Tensor:
    """Unpack [N, K/2] bytes to int8 [N, K], every code times 16."""
    global _scratch  # noqa: PLW0603 (one buffer for all layers: a call's weights are dead when it returns)
    rows, half = weight.shape
    if _scratch.numel() < 2 * rows * half or _scratch.device != weight.device:
        with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
            _scratch = torch.empty(2 * rows * half, dtype=torch.int8, device=weight.device)
    unpacked = _scratch[: 2 * rows * half].view(rows, 2 * half)
    torch.mul(weight, UNPACKED_FACTOR, out=unpacked[:, :half])
    torch.bitwise_and(weight, -UNPACKED_FACTOR, out=unpacked[:, half:])
    return unpacked


def _center(codes: torch.Tensor, zero: torch.Tensor, num_bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Subtract zero-points from codes; return int8 [tokens, K] and zero-point offsets [tokens, groups] or None.

    4-bit codes less their zero-points lie in -15 .. 15. 8-bit ones need 9 bits, so only 128 is subtracted here, and
    the offset zero - 128 from the product.
    """
    if num_bits == 8:
        return (codes ^ 0x80).view(torch.int8), zero - 128
    grouped = codes.view(torch.int8).view(len(codes), zero.shape[1], -1)
    return (grouped - zero.to(torch.int8)[..., None]).view(codes.shape), None


def _row_sums(weight: torch.Tensor) -> torch.Tensor:
    """Sum rows of int8 [N, K] to int32 [1, N]; a product is faster than a sum."""
    return _int_matmul(weight.new_ones(1, weight.shape[1]), weight)


def _code_sums(centered: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """Sum the codes of each token less their zero-points: int32 [tokens, 1]."""
    total = centered.sum(1, keepdim=True, dtype=torch.int32)
    return total if offset is None else total - offset * centered.shape[1]


def _group_products(codes: torch.Tensor, weight: torch.Tensor, groups: int) -> list[torch.Tensor]:
    """Multiply int8 codes [tokens, K] and weight [N, K] within each group of features: exact int32 [tokens, N] each.

    With few rows the groups become rows of one product, zero outside their group: a call costs more than the
    multiplications with zeros.
    """
    tokens, features = codes.shape
    if groups == 1:
        return [_int_matmul(codes, weight)]
    if tokens * groups <= EXPAND_ROWS:
        rows = codes.new_zeros(groups, tokens, groups, features // groups)
        rows.diagonal(dim1=0, dim2=2).copy_(codes.view(tokens, groups, -1).permute(0, 2, 1))
        return list(_int_matmul(rows.view(groups * tokens, features), weight).view(groups, tokens, -1))
    parts = zip(codes.chunk(groups, 1), weight.chunk(groups, 1), strict=True)
    return [_int_matmul(a.contiguous(), w) for a, w in parts]


def _int_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply int8 a [M, K] and b [N, K] exactly: int32 [M, N]."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    return (a.double() @ b.double().t()).int()  # elsewhere _int_mm takes few shapes
