"""Search the clip ratios of activations that minimize the error of rounding and clipping.

How far a range should shrink depends on how many values share it and on their distribution: with 4-bit
codes of Gaussian values, groups of 32 are best unclipped, groups of 64 at 0.95, tokens of 576 at 0.85.
"""

import torch

from infoquant_vllm.format import ActivationArgs, activation_groups
from infoquant_vllm.kernels.torch.quantize import quantize_groups
from offline.algorithms.fake_quantize import input_quant

GRID = tuple(1.0 - 0.025 * step for step in range(17))


def search_clips(y: torch.Tensor, args: ActivationArgs) -> torch.Tensor:
    """Return the clip ratios [groups, 2], equal for minimum and maximum, with the least squared error of y.

    A group has the ratio that is best if all groups have it: they share a scale, but hardly depend on each other.

    y: [tokens, K] float32, inputs after their transform; every token counts the same, whatever its norm
    """
    groups = activation_groups(args, y.shape[1])
    y = y / y.square().mean(1, keepdim=True).sqrt().clamp(min=torch.finfo(y.dtype).tiny)
    best = torch.full((groups,), torch.inf, device=y.device)
    found = torch.ones(groups, 2, device=y.device)
    for factor in GRID:
        quantized = quantize_groups(y, input_quant(args, torch.full_like(found, factor), y.shape[1]))
        lost = quantized.dequantized().sub_(y.unflatten(1, (groups, -1))).square_().sum((0, 2))
        better = lost < best
        best, found = torch.where(better, lost, best), torch.where(better[:, None], factor, found)
    return found
