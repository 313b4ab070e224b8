"""Input transform and activation quantizer, as the checkpoint format defines them."""

import torch

from infoquant_vllm.format import apply_hadamard


def rotate_quantize(
    x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int, clip: torch.Tensor, num_bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Transform x [tokens, K] (see `rotate`), then quantize each of the G groups that clip [G, 2] has.

    Returns codes [tokens, K] uint8, scale [tokens, G] float32, zero [tokens, G] int32. Everything is
    in float32 and every operation rounds: a last bit decides about codes, and a code about all that
    comes after it. A value is multiplied by 1 / scale, rounded, rather than divided by the scale.
    """
    y = rotate(x.float(), matrices, hadamard).unflatten(-1, (len(clip), -1))  # [tokens, groups, group_size]
    qmax = 2**num_bits - 1
    low = y.amin(-1).clamp(max=0) * clip[:, 0]
    high = y.amax(-1).clamp(min=0) * clip[:, 1]
    if symmetric:
        scale = (torch.maximum(-low, high) / (2 ** (num_bits - 1) - 1)).clamp(min=1e-12)
        zero = torch.full_like(scale, 2 ** (num_bits - 1))
    else:
        scale = ((high - low) / qmax).clamp(min=1e-12)
        zero = torch.round(-low * (1 / scale))
    codes = torch.clamp(torch.round(y * (1 / scale)[..., None]) + zero[..., None], 0, qmax)
    return codes.flatten(-2).to(torch.uint8), scale, zero.to(torch.int32)


def rotate(x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int) -> torch.Tensor:
    """x [tokens, K] float32 through the input transform of a linear.

    - hadamard: blocks of so many features through `apply_hadamard` (0: none)
    - matrices: one [blocks, b, b], a matrix per block, or two whose Kronecker product is [K, K],
      applied one after the other; float32

    A product with a matrix is summed in float64 and rounded to float32 once: the order of the sum
    shows in no more than a last bit in many millions.
    """
    if hadamard:
        return apply_hadamard(x.unflatten(-1, (-1, hadamard))).flatten(-2)
    if not matrices:
        return x
    if matrices[0].dim() == 3:
        blocks = x.unflatten(-1, (len(matrices[0]), -1)).transpose(0, 1)
        return (blocks.double() @ matrices[0].double()).float().transpose(0, 1).flatten(1)
    left, right = (matrix.double() for matrix in matrices)
    y = (left.t() @ x.unflatten(-1, (len(left), -1)).double()).float()
    return (y.double() @ right).float().flatten(1)
