"""Input transforms and quantizers of activations, keys and values, as the checkpoint format defines them.

Quantizers work in float32 and every operation rounds: a last bit decides about a code, and a code about all layers
after it. The order of the operations is part of the definition.
"""

from collections.abc import Callable

import torch

from infoquant_vllm.format import apply_hadamard

MIN_SCALE = 1e-12
MIN_KV_SCALE = 2.0**-20
MAX_FLOAT16 = 65504.0


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


def rotate_quantize(
    x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int, clip: torch.Tensor, num_bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply the input transform to x [tokens, K], then quantize it in the groups that clip [groups, 2] has.

    Returns codes [tokens, K] uint8, scales [tokens, groups] float32, zero-points [tokens, groups] int32.
    """
    codes, scale, zero = quantize_groups(apply_transform(x.float(), matrices, hadamard), clip, num_bits, symmetric)
    return codes.to(torch.uint8).flatten(1), scale.squeeze(-1), zero.squeeze(-1).int()


def quantize_groups(
    y: torch.Tensor, clip_ratio: torch.Tensor, num_bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize y [tokens, K] float32 per token and group; clip_ratio [groups, 2] scales each minimum and maximum.

    Returns codes [tokens, groups, group_size], scales and zero-points [tokens, groups, 1], all float32 and all but
    the scales integers: y is about (code - zero) * scale. A value is multiplied by 1 / scale, rounded, and not
    divided by the scale.
    """
    grouped = y.unflatten(-1, (len(clip_ratio), -1))
    qmax, half = 2**num_bits - 1, 2 ** (num_bits - 1)
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    low, high = low.clamp(max=0) * clip_ratio[:, :1], high.clamp(min=0) * clip_ratio[:, 1:]
    if symmetric:
        scale = (torch.maximum(-low, high) / (half - 1)).clamp(min=MIN_SCALE)
        zero = torch.full_like(scale, half)
    else:
        scale = ((high - low) / qmax).clamp(min=MIN_SCALE)
        zero = torch.round(-low * (1 / scale))
    codes = (grouped * (1 / scale)).round_().add_(zero).clamp_(0, qmax)
    return codes, scale, zero


def quantize_int16(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize y [tokens, K] float32 per token to int16; return a row of high and a row of low bytes for each token.

    Returns codes [2 * tokens, K] uint8, scales [2 * tokens, 1] float32, zero-points [2 * tokens, 1] int32, like an
    8-bit quantizer. The largest magnitude of a token is 32767 steps: finer than bf16 holds it.
    """
    step = (y.abs().amax(1, keepdim=True) / 32767).clamp(min=MIN_SCALE)
    codes = torch.round(y * (1 / step)).int() + 32768
    scale = torch.stack((step * 256, step), 1)
    zero = torch.tensor([[128], [0]], dtype=torch.int32, device=y.device).expand(len(y), 2, 1)
    byte_rows = torch.stack((codes >> 8, codes & 255), 1)
    return byte_rows.flatten(0, 1).to(torch.uint8), scale.flatten(0, 1), zero.flatten(0, 1)


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
