"""GPTQ: round column by column, and compensate each column's error in those not yet rounded.

E. Frantar et al., arXiv 2210.17323, sections 3.2 to 3.4 (without act-order), in the form that J. Chee
et al. show to give the same codes (LDLQ, arXiv 2307.13304, theorem 6): by a factor of the Hessian
itself rather than of its inverse, which is half the work and need not be in memory beside it.
"""

from contextlib import suppress

import torch

from infoquant_vllm.format import WeightArgs
from offline.algorithms.rtn import QuantizedWeight, Steps, quantized_weight, search_scales, search_steps

BLOCK = 32
"""Columns that are rounded before their errors are passed on to all later ones."""
FACTOR_BLOCK = 2048
"""Columns of the Hessian that are factored together."""
DAMPENING_GROWTH, MAX_GROWTHS = 10.0, 12
"""Factor on the dampening of a Hessian that is not positive definite, and how often it is tried."""
MAX_ERROR_ROWS = 2048
"""Rows on which the output error is estimated; all rows would take as long as GPTQ itself."""


def gptq(weight: torch.Tensor, hessian: torch.Tensor, args: WeightArgs, dampening_frac: float) -> QuantizedWeight:
    """Quantize weight [N, K] float32 for inputs x with sum of x^T x = hessian [K, K].

    Scales come from a clip search on the weights, over whole rows before anything is rounded. With groups, the
    multipliers are searched for each group just before it is rounded.
    """
    rest = weight.T.clone(
        memory_format=torch.contiguous_format
    )  # [K, N]: rows that are rounded together are contiguous
    factor, end = unit_factor(hessian, dampening_frac), len(rest)
    group, scale = args.group_size or end, search_scales(weight, args)
    found: list[Steps] = []
    for first in range(0, end, group):
        steps = search_steps(_compensated(weight, rest, factor, slice(first, first + group)), scale, args)
        found.append(steps)
        for start in range(first, first + group, BLOCK):
            stop = min(start + BLOCK, first + group)
            rows, target = _part(factor, slice(start, stop), slice(start, end)), weight.T[start:stop].contiguous()
            codes, errors = _round_block(target, rest[start:stop], rows[:, : stop - start], steps)
            rest[start:stop] = codes  # in place of weights that are no longer read
            rest[stop:].addmm_(rows[:, stop - start :].T, errors)
    return quantized_weight(rest.T, scale, found)


def _compensated(weight: torch.Tensor, rest: torch.Tensor, factor: list[torch.Tensor], group: slice) -> torch.Tensor:
    """Return a group's weights [N, G] that best compensate the errors before it, if none of them were rounded.

    `rest` has what each weight compensates while the others of the group stay unchanged.
    """
    own = weight[:, group]
    if group.start == 0:
        return own
    square = _part(factor, group, group)
    pushed = (rest[group].T - own).contiguous()
    return own + torch.linalg.solve_triangular(square, pushed, upper=True, left=False, unitriangular=True)


def _round_block(
    target: torch.Tensor, rows: torch.Tensor, factor: torch.Tensor, steps: Steps
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and errors [B, N] of B inputs' weights `target` [B, N], one input after the other.

    rows: [B, N], the weights with the errors of the inputs before the block compensated
    """
    steps = Steps(steps.step[:, 0], steps.zero[:, 0], steps.lowest, steps.highest)
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    for index, row in enumerate(rows):
        if index:
            row = torch.addmv(row, errors[:index].T, factor[:index, index])  # noqa: PLW2901
        codes[index] = steps.codes(row)
        errors[index] = target[index] - steps.values(codes[index])
    return codes, errors


def unit_factor(hessian: torch.Tensor, dampening_frac: float) -> list[torch.Tensor]:
    """Factor H + dampening_frac * mean |diag H| I = U D U^T; returns the unit upper triangular U. D is diagonal.

    The dampening keeps D positive for inputs that are never used, or with fewer tokens than inputs. It grows where that
    is not enough: inputs that are nearly their mean leave a Hessian of rounding errors. U is returned in blocks of
    FACTOR_BLOCK columns float32, each down to the diagonal, `U[:stop, start:stop]`.
    """
    mean = hessian.diagonal().double().abs().mean().item()
    dampening = dampening_frac * mean if mean > 0 else 1.0
    for _ in range(MAX_GROWTHS):
        with suppress(torch.linalg.LinAlgError):
            return _factor(hessian, dampening)
        dampening *= DAMPENING_GROWTH
    return _factor(hessian, dampening)


def _factor(hessian: torch.Tensor, dampening: float) -> list[torch.Tensor]:
    """Factor H + dampening I as `unit_factor` does, in float64, from the last block of columns to the first."""
    blocks = _blocks(len(hessian))
    found = [hessian[: block.stop, block].to(torch.float64, copy=True) for block in blocks]
    for block, columns in reversed(list(zip(blocks, found, strict=True))):
        columns[block].diagonal().add_(dampening)
        upper = torch.linalg.cholesky(columns[block].flip(0, 1)).flip(0, 1)
        columns[block] = upper
        for other in _blocks(block.start):
            columns[other] = torch.linalg.solve_triangular(upper.T, columns[other], upper=False, left=False)
        for other, earlier in zip(_blocks(block.start), found, strict=False):
            earlier.addmm_(columns[: other.stop], columns[other].T, alpha=-1)
        found[block.start // FACTOR_BLOCK] = columns.div_(upper.diagonal()).float()
    return found


def _part(factor: list[torch.Tensor], rows: slice, columns: slice) -> torch.Tensor:
    """Return rows and columns of a `unit_factor`; entries left of the diagonal are undefined."""
    found = factor[0].new_empty(columns.stop - columns.start, rows.stop - rows.start).T
    for block, own in zip(_blocks(len(factor[-1])), factor, strict=True):
        start, stop = max(block.start, columns.start), min(block.stop, columns.stop)
        if start < stop:
            part = own[rows, start - block.start : stop - block.start]
            found[: len(part), start - columns.start : stop - columns.start] = part
    return found


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + FACTOR_BLOCK, size)) for start in range(0, size, FACTOR_BLOCK)]


def output_error(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor) -> float:
    """Return the relative squared error of the outputs: tr(D H D^T) / tr(W H W^T), D = W - Q.

    Estimated on MAX_ERROR_ROWS evenly spaced rows where there are more.
    """
    rows = slice(None, None, -(-len(weight) // MAX_ERROR_ROWS))
    weight, values = weight[rows], quantized.rows(rows).values()
    lost, total = _energy(weight - values, hessian), _energy(weight, hessian)
    return max(lost, 0.0) / total if total > 0 else 0.0


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return tr(W H W^T) from the upper triangle of H, whose entries above the diagonal count twice."""
    total = 0.0
    for block in _blocks(len(hessian)):
        product = weight[:, block] @ hessian[block, block.start :]
        once, twice = product.split([block.stop - block.start, len(hessian) - block.stop], dim=1)
        total += torch.linalg.vecdot(once, weight[:, block]).sum().item()
        total += 2 * torch.linalg.vecdot(twice, weight[:, block.stop :]).sum().item()
    return total
