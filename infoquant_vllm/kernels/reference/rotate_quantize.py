"""Input transform and activation quantiser, as the checkpoint format defines them."""

from functools import reduce

import torch


def rotate_quantize(
    x: torch.Tensor, matrices: list[torch.Tensor], clip: torch.Tensor, num_bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate x [tokens, K] by `matrices`, then quantise each of the G groups that clip [G, 2] has.

    `matrices`: none, or one [blocks, b, b] (a matrix per block), or square ones whose Kronecker
    product, in order, every block of its size is multiplied by. All float32.
    Returns codes [tokens, K] uint8, scale [tokens, G] float32, zero [tokens, G] int32.
    """
    y = rotate(x.float(), matrices).unflatten(-1, (len(clip), -1))  # [tokens, groups, group_size]
    qmax = 2**num_bits - 1
    low = y.amin(-1).clamp(max=0) * clip[:, 0]
    high = y.amax(-1).clamp(min=0) * clip[:, 1]
    if symmetric:
        scale = (torch.maximum(-low, high) / (2 ** (num_bits - 1) - 1)).clamp(min=1e-12)
        zero = torch.full_like(scale, 2 ** (num_bits - 1))
    else:
        scale = ((high - low) / qmax).clamp(min=1e-12)
        zero = torch.round(-low / scale)
    codes = torch.clamp(torch.round(y / scale[..., None]) + zero[..., None], 0, qmax)
    return codes.flatten(-2).to(torch.uint8), scale, zero.to(torch.int32)


def rotate(x: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    """x [tokens, K] float32 times the transform that `matrices` stands for (see `rotate_quantize`)."""
    if not matrices:
        return x
    if matrices[0].dim() == 3:
        blocks, size, _ = matrices[0].shape
        return torch.einsum("tbi,bij->tbj", x.unflatten(-1, (blocks, size)), matrices[0]).flatten(-2)
    matrix = reduce(torch.kron, matrices)
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)
