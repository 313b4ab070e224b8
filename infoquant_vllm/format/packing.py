"""Pack 4-bit and 8-bit codes into bytes, and unpack them."""

import torch

from infoquant_vllm.format.errors import FormatError


def pack_codes(codes: torch.Tensor, num_bits: int, signed: bool) -> torch.Tensor:
    """Pack codes [..., K] into bytes [..., K * num_bits / 8] uint8; an even k is the low nibble.

    Signed codes are in two's complement. Raises FormatError for a code that does not fit.
    """
    offset = 2 ** (num_bits - 1) if signed else 0
    low, high = int(codes.min()), int(codes.max())
    if low < -offset or high >= 2**num_bits - offset:
        raise FormatError(f"codes {low}..{high} do not fit in {num_bits} {'signed' if signed else 'unsigned'} bits")
    if num_bits == 8:
        return (codes.to(torch.int16) & 0xFF).to(torch.uint8)
    if codes.shape[-1] % 2:
        raise FormatError(f"{codes.shape[-1]} codes per row cannot be packed in pairs")
    nibbles = (codes.to(torch.int16) & 0xF).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_codes(packed: torch.Tensor, num_bits: int, signed: bool) -> torch.Tensor:
    """Unpack bytes [..., B] uint8 into codes [..., B * 8 / num_bits]; the inverse of `pack_codes`.

    Returns int8 for signed and uint8 for unsigned codes.
    """
    if num_bits == 8:
        return packed.view(torch.int8) if signed else packed
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return (codes ^ 8).to(torch.int8) - 8 if signed else codes
