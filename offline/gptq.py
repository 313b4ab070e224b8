"""GPTQ: rounding column by column, each column's error pushed into those not yet rounded.

E. Frantar et al., arXiv 2210.17323, sections 3.2 to 3.4 (without act-order).
"""

import torch

from infoquant_vllm.format import WeightArgs
from offline.weights import QuantizedWeight, Scales, search_scales

BLOCK = 32
FACTOR_BLOCK = 2048
"""Columns of the Hessian that are factored together."""
ROWS_AT_A_TIME = 2048


def gptq(weight: torch.Tensor, hessian: torch.Tensor, args: WeightArgs, damping: float) -> QuantizedWeight:
    """Quantise weight [N, K] float32 for inputs x with sum of x^T x = hessian [K, K].

    Scales come from a clip search on the weights: over whole rows before anything is rounded, or,
    with groups, over each group when its turn comes.
    """
    rest = weight.T.clone(memory_format=torch.contiguous_format)  # [K, N]: what is rounded together lies together
    factor, strip = inverse_factor(hessian, damping), rest.new_empty(len(rest), BLOCK).T
    group = args.group_size or len(rest)
    found: list[Scales] = []
    for first in range(0, len(rest), group):
        scales = search_scales(rest[first : first + group].T, args)
        found.append(scales)
        for start in range(first, first + group, BLOCK):
            stop = min(start + BLOCK, first + group)
            rows = strip[: stop - start].copy_(factor[start:stop])
            codes, errors = _round_block(rest[start:stop], rows[:, start:stop], scales)
            rest[start:stop] = codes  # whose weights nothing reads any more
            rest[stop:].addmm_(rows[:, stop:].T, errors, alpha=-1)
    scale, zero = (torch.cat([getattr(scales, name) for scales in found], dim=1) for name in ("scale", "zero"))
    return QuantizedWeight(rest.T, scale, zero)


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
    It takes one matrix in float64 and a few blocks: H = R R^T with R upper triangular, so U = R^-1,
    and both steps run in place.
    """
    matrix = hessian.to(torch.float64, copy=True).T  # column after column, as LAPACK works
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    diagonal += damping * mean if mean > 0 else 1.0
    _factor_in_place(matrix)
    _invert_in_place(matrix)
    return matrix


def _factor_in_place(matrix: torch.Tensor) -> None:
    """R of `matrix` = R R^T in place of its upper triangle, from the last block of columns to the first."""
    for block in reversed(_blocks(len(matrix))):
        upper = torch.linalg.cholesky(matrix[block, block].flip(0, 1)).flip(0, 1)
        matrix[block, block] = upper
        above = matrix[: block.start, block]
        for other in _blocks(block.start):
            above[other] = torch.linalg.solve_triangular(upper.T, above[other], upper=False, left=False)
        for other in _blocks(block.start):
            matrix[: other.stop, other].addmm_(above[: other.stop], above[other].T, alpha=-1)


def _invert_in_place(matrix: torch.Tensor) -> None:
    """The inverse of an upper triangular matrix in its place; zeros go below its diagonal."""
    for block in _blocks(len(matrix)):
        size = block.stop - block.start
        eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(matrix[block, block], eye, upper=True)
        matrix[block, block] = inverse
        matrix[block.stop :, block] = 0
        for other in _blocks(block.start):  # the rows above are read from this one on, so it can be overwritten
            above = matrix[other, other.start : block.start] @ matrix[other.start : block.start, block]
            matrix[other, block] = -(above @ inverse)


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + FACTOR_BLOCK, size)) for start in range(0, size, FACTOR_BLOCK)]


def output_error(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor) -> float:
    """Share of the output's energy that is lost: tr(D H D^T) / tr(W H W^T), D = W - Q."""
    lost = total = 0.0
    for start in range(0, len(weight), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        lost += _energy(weight[rows] - quantized.rows(rows).values(), hessian)
        total += _energy(weight[rows], hessian)
    return max(lost, 0.0) / total if total > 0 else 0.0


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(W H W^T), by what is on and above the diagonal of H: what is above counts twice."""
    total = 0.0
    for block in _blocks(len(hessian)):
        product = weight[:, block] @ hessian[block, block.start :]
        once, twice = product.split([block.stop - block.start, len(hessian) - block.stop], dim=1)
        total += torch.linalg.vecdot(once, weight[:, block]).sum().item()
        total += 2 * torch.linalg.vecdot(twice, weight[:, block.stop :]).sum().item()
    return total
