"""Quantized linear on the CPU: weights stay packed, oneDNN multiplies int8 exactly into int32.

4-bit weights are unpacked at every call into a scratch buffer that all layers share: one shift and
one mask per byte, at the cost of reading half a byte per weight. They come out times 16 (a signed
nibble in the high half of an int8 needs no sign extension); the scale takes the 16 out again.
"""

import torch
import torch.nn.functional as F

UNPACKED_FACTOR = 16
EXPAND_ROWS = 64

_scratch = torch.empty(0, dtype=torch.int8)


def prepare_weight(packed: torch.Tensor, num_bits: int, signed: bool, groups: int = 1) -> torch.Tensor:
    """Checkpoint bytes [N, K * num_bits / 8] to this kernel's layout, as many bytes, whatever the groups are.

    All codes become signed (unsigned ones lose 2^(bits-1), as their zero points must). A 4-bit row
    holds feature j in the low and feature K/2 + j in the high nibble of byte j.
    """
    if num_bits == 8:
        return (packed if signed else packed ^ 0x80).view(torch.int8).contiguous()
    nibbles = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)  # [N, K] in order of K
    low, high = (nibbles if signed else nibbles ^ 8).chunk(2, dim=1)
    return (low | (high << 4)).view(torch.int8).contiguous()


def weight_rows(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    """Signed codes [..., features] int8 of some rows of an 8-bit weight from `prepare_weight`."""
    return F.embedding(rows, weight)


def prepare_grid(grid: torch.Tensor) -> torch.Tensor:
    """Scales or zero points [N, groups] as they are."""
    return grid


def quantized_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As the reference, on a weight from `prepare_weight`; `num_bits` are those of the activations.

    The sum over groups runs in order of K, each addition rounded to float32, for any number of
    rows; the channel scale comes after it.
    """
    features = codes.shape[1]
    factor = 1 if weight.shape[1] == features else UNPACKED_FACTOR
    unpacked = weight if factor == 1 else _unpack(weight)
    groups = max(scale.shape[1], weight_scale.shape[1])
    left, rest = _centre(codes, zero, num_bits)
    out: torch.Tensor | None = None
    for g, total in enumerate(_products(left, unpacked, groups)):
        part = slice(g * features // groups, (g + 1) * features // groups)
        a, w = g * scale.shape[1] // groups, g * weight_scale.shape[1] // groups
        if rest is not None:
            total.sub_(rest[:, a, None] * _row_sums(unpacked[:, part]))
        if weight_zero is not None:
            centred_sum = _centred_sum(left[:, part], None if rest is None else rest[:, a])
            total.sub_(centred_sum[:, None] * ((weight_zero[:, w].int() - 2 ** _bits(factor)) * factor))
        term = total.float()
        if weight_scale.shape[1] > 1:
            term.mul_(weight_scale[:, w])
        term.mul_(scale[:, a, None])
        out = term if out is None else out.add_(term)
    assert out is not None
    if weight_scale.shape[1] == 1:
        out.mul_(weight_scale[:, 0])
    if factor != 1:
        out.div_(factor)
    return (out if bias is None else out.add_(bias)).to(dtype)


def _bits(factor: int) -> int:
    return 7 if factor == 1 else 3


def _unpack(weight: torch.Tensor) -> torch.Tensor:
    """[N, K/2] bytes to int8 [N, K], every code times 16."""
    global _scratch  # noqa: PLW0603 (one buffer for all layers: a call's weights are dead when it returns)
    rows, half = weight.shape
    if _scratch.numel() < 2 * rows * half:
        _scratch = torch.empty(2 * rows * half, dtype=torch.int8)
    unpacked = _scratch[: 2 * rows * half].view(rows, 2 * half)
    torch.mul(weight, UNPACKED_FACTOR, out=unpacked[:, :half])
    torch.bitwise_and(weight, -UNPACKED_FACTOR, out=unpacked[:, half:])
    return unpacked


def _centre(codes: torch.Tensor, zero: torch.Tensor, num_bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """int8 [tokens, K] and what is still to be subtracted [tokens, groups] (None: nothing).

    Codes of 4 bits less their zero lie in -15 .. 15. Those of 8 bits need 9 bits, so that 128 is
    subtracted here and the rest of the zero from the product.
    """
    if num_bits == 8:
        return (codes ^ 0x80).view(torch.int8), zero - 128
    grouped = codes.view(torch.int8).view(len(codes), zero.shape[1], -1)
    return (grouped - zero.to(torch.int8)[..., None]).view(codes.shape), None


def _row_sums(weight: torch.Tensor) -> torch.Tensor:
    """[1, N] int32; as a product it is faster than as a sum."""
    return torch._int_mm(weight.new_ones(1, weight.shape[1]), weight.t())


def _centred_sum(left: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
    total = left.sum(1, dtype=torch.int32)
    return total if rest is None else total - rest * left.shape[1]


def _products(left: torch.Tensor, weight: torch.Tensor, groups: int) -> list[torch.Tensor]:
    """Exact int32 products [tokens, N] of every group of features.

    For few rows the groups become rows of one product, zero outside their group: a call costs more
    than the multiplications it does in vain.
    """
    tokens, features = left.shape
    if groups == 1:
        return [torch._int_mm(left, weight.t())]
    if tokens * groups <= EXPAND_ROWS:
        rows = left.new_zeros(groups, tokens, groups, features // groups)
        rows.diagonal(dim1=0, dim2=2).copy_(left.view(tokens, groups, -1).permute(0, 2, 1))
        return list(torch._int_mm(rows.view(groups * tokens, features), weight.t()).view(groups, tokens, -1))
    parts = zip(left.chunk(groups, 1), weight.chunk(groups, 1), strict=True)
    return [torch._int_mm(a.contiguous(), w.t()) for a, w in parts]
