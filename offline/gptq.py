"""GPTQ: rounding column by column, each column's error pushed into those not yet rounded.

E. Frantar et al., arXiv 2210.17323, sections 3.2 to 3.4 (without act-order).
"""

import torch

from infoquant_vllm.format import WeightArgs
from offline.weights import QuantizedWeight, search_scales

BLOCK = 128


def gptq(weight: torch.Tensor, hessian: torch.Tensor, args: WeightArgs, damping: float) -> QuantizedWeight:
    """Quantise weight [N, K] float32 for inputs x with sum of x^T x = hessian [K, K].

    Scales come from a clip search on the weights: over whole rows before anything is rounded, or,
    with groups, over each group when its turn comes.
    """
    weight = weight.clone()
    inverse = inverse_factor(hessian, damping).to(weight.dtype)
    codes = torch.empty_like(weight)
    width = args.group_size or BLOCK
    scales = search_scales(weight, args)
    found = [] if args.group_size else [scales]
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        if args.group_size:
            scales = search_scales(weight[:, start:stop], args)
            found.append(scales)
        block, errors = weight[:, start:stop], torch.empty_like(weight[:, start:stop])
        factor = inverse[start:stop, start:stop]
        for column in range(stop - start):
            current = block[:, column : column + 1]
            code = scales.codes(current)
            errors[:, column : column + 1] = (current - scales.values(code)) / factor[column, column]
            block.addr_(errors[:, column], factor[column], alpha=-1)
            codes[:, start + column] = code[:, 0]
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    scale, zero = (torch.cat([getattr(s, name) for s in found], dim=1) for name in ("scale", "zero"))
    return QuantizedWeight(codes, scale, zero)


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
