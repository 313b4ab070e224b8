"""Input transform and activation quantizer on the CPU; semantics: kernels/reference."""

import torch

from infoquant_vllm.kernels.reference.rotate_quantize import rotate


def rotate_quantize(
    x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int, clip: torch.Tensor, num_bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference, of which it differs in not copying as much."""
    y = rotate(x.float(), matrices, hadamard).view(len(x), len(clip), -1)  # [tokens, groups, group_size]
    qmax = 2**num_bits - 1
    low, high = torch.aminmax(y, dim=-1)
    low, high = low.clamp_(max=0).mul_(clip[:, 0]), high.clamp_(min=0).mul_(clip[:, 1])
    if symmetric:
        scale = torch.maximum(-low, high).div_(2 ** (num_bits - 1) - 1).clamp_(min=1e-12)
        zero = torch.full_like(scale, 2 ** (num_bits - 1))
    else:
        scale = (high - low).div_(qmax).clamp_(min=1e-12)
        zero = torch.round(-low * (1 / scale))
    codes = (y * (1 / scale)[..., None]).round_().add_(zero[..., None]).clamp_(0, qmax)
    return codes.to(torch.uint8).view(x.shape), scale, zero.to(torch.int32)
