"""GPTQ: rounding column by column, each column's error pushed into those not yet rounded.

E. Frantar et al., arXiv 2210.17323, sections 3.2 to 3.4 (without act-order).
"""

import torch

from infoquant_vllm.format import WeightArgs
from offline.weights import QuantizedWeight, Scales, search_scales

BLOCK = 32


def gptq(weight: torch.Tensor, hessian: torch.Tensor, args: WeightArgs, damping: float) -> QuantizedWeight:
    """Quantise weight [N, K] float32 for inputs x with sum of x^T x = hessian [K, K].

    Scales come from a clip search on the weights: over whole rows before anything is rounded, or,
    with groups, over each group when its turn comes.
    """
    rest = weight.T.contiguous()  # [K, N]: what is rounded together lies together
    codes = torch.empty_like(rest)
    factor = inverse_factor(hessian, damping).to(weight.dtype)
    group = args.group_size or len(rest)
    found: list[Scales] = []
    for first in range(0, len(rest), group):
        scales = search_scales(rest[first : first + group].T.contiguous(), args)
        found.append(scales)
        for start in range(first, first + group, BLOCK):
            stop = min(start + BLOCK, first + group)
            codes[start:stop], errors = _round_block(rest[start:stop], factor[start:stop, start:stop], scales)
            rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    scale, zero = (torch.cat([getattr(scales, name) for scales in found], dim=1) for name in ("scale", "zero"))
    return QuantizedWeight(codes.T, scale, zero)


def _round_block(rows: torch.Tensor, factor: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors [B, N] of B inputs' weights `rows` [B, N], one input after the other."""
    scales = Scales(scales.scale[:, 0], scales.zero[:, 0], scales.lowest, scales.highest)
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    for index, row in enumerate(rows):
        if index:
            row = torch.addmv(row, errors[:index].T, factor[:index, index], alpha=-1)  # noqa: PLW2901
        codes[index] = scales.codes(row)
        errors[index] = (row - scales.values(codes[index])) / factor[index, index]
    return codes, errors


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor U, U^T U = (H + damping * mean(diag H) I)^-1, float64.

    The damping keeps H invertible where inputs are never used or fewer tokens than inputs were seen.
    """
    matrix = hessian.double().clone()
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    diagonal += damping * mean if mean > 0 else 1.0
    # Cholesky from the last input to the first: H = R R^T with R upper triangular, so U = R^-1.
    upper = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """Share of the output's energy that is lost: tr(D H D^T) / tr(W H W^T), D = W - Q."""
    difference = weight - quantized
    lost, total = (((w @ hessian) * w).sum().item() for w in (difference, weight))
    return max(lost, 0.0) / total if total > 0 else 0.0
