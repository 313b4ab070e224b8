"""Refine rounded weights: codes by coordinate descent, one input at a time, and scales in closed form.

Both steps lower tr((W - Q) H (W - Q)^T), the squared error of the outputs, and never raise it. The first is
cyclic coordinate descent over the codes (Behdin et al., "QuantEase", arXiv 2309.01885, section 3.2);
the second solves for all scales of a row with its codes fixed, which is linear least squares.
"""

import torch

from infoquant_vllm.format import WeightArgs
from offline.algorithms.rtn import QuantizedWeight, Scales, code_range

BLOCK = 32
ROWS_AT_A_TIME = 8192
"""Rows that are refined together; bounds peak memory."""
SYSTEM_ELEMENTS = 2**24
"""Elements of the systems of equations that are solved together; a row with G groups has G^2."""
REGULARIZATION = 1e-4
"""Dampening, as a share of the Hessian's mean diagonal: weights of unused inputs stay near their values."""
SMALLEST_CHANGE = 0.5
"""Smallest factor by which a scale may change; its inverse is the largest. Others come from groups of no effect."""


def refine(
    weight: torch.Tensor, rounded: QuantizedWeight, hessian: torch.Tensor, args: WeightArgs, passes: int
) -> QuantizedWeight:
    """Refine `rounded` by `passes` of both steps; weight [N, K] float32, hessian [K, K] as in `gptq`."""
    diagonal = hessian.diagonal().mean()
    if passes == 0 or diagonal <= 0:
        return rounded
    hessian = hessian.clone()
    hessian.diagonal().add_(REGULARIZATION * diagonal)
    rows, parts = weight.split(ROWS_AT_A_TIME), []
    for own, part in zip(rows, rounded.split([len(own) for own in rows]), strict=True):
        for _ in range(passes):
            part = refit_scales(own, descend(own, part, hessian, args), hessian)  # noqa: PLW2901
        parts.append(part)
    return QuantizedWeight(*(torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale", "zero")))


def descend(weight: torch.Tensor, rounded: QuantizedWeight, hessian: torch.Tensor, args: WeightArgs) -> QuantizedWeight:
    """Set every code once, in order, to the best one given all others."""
    lowest, highest = code_range(args)
    groups = rounded.scale.shape[1]
    size = weight.shape[1] // groups
    codes = rounded.codes.T.clone(
        memory_format=torch.contiguous_format
    )  # [K, N]: rows that change together are contiguous
    difference = (weight - rounded.values()).T.contiguous()
    gradient = hessian @ difference
    for group in range(groups):
        scales = Scales(rounded.scale[:, group], rounded.zero[:, group], lowest, highest)
        for start in range(group * size, (group + 1) * size, BLOCK):
            part = slice(start, min(start + BLOCK, (group + 1) * size))
            own, before = hessian[part, part], difference[part].clone()
            _descend_block(weight.T[part], codes[part], difference[part], gradient[part].clone(), own, scales)
            gradient.addmm_(hessian[:, part], difference[part] - before)
    return QuantizedWeight(codes.T.contiguous(), rounded.scale, rounded.zero)


def _descend_block(
    weight: torch.Tensor,
    codes: torch.Tensor,
    difference: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scales: Scales,
) -> None:
    """Update codes and difference [B, N] of B inputs in place; `gradient` [B, N] is their rows of H (W - Q)."""
    for index, row in enumerate(weight):
        target = row - difference[index] + gradient[index] / hessian[index, index]
        codes[index] = scales.codes(target)
        found = row - scales.values(codes[index])
        gradient.addr_(hessian[:, index], found - difference[index])
        difference[index] = found


def refit_scales(weight: torch.Tensor, rounded: QuantizedWeight, hessian: torch.Tensor) -> QuantizedWeight:
    """Solve for the scales [N, G] that minimize the error for the given codes and zero-points.

    With C_g the codes minus zero-points of group g and 0 elsewhere: sum_h (C_g H C_h^T) s_h = C_g H w^T.
    """
    groups = rounded.scale.shape[1]
    rows = max(1, SYSTEM_ELEMENTS // groups**2)
    parts = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    scales = [_refit_rows(weight[part], rounded.rows(part), hessian) for part in parts]
    return QuantizedWeight(rounded.codes, torch.cat(scales), rounded.zero)


def _refit_rows(weight: torch.Tensor, rounded: QuantizedWeight, hessian: torch.Tensor) -> torch.Tensor:
    groups = rounded.scale.shape[1]
    codes = rounded.codes.unflatten(1, (groups, -1)) - rounded.zero[:, :, None]  # [N, G, K / G]
    blocks = hessian.view(groups, codes.shape[2], -1)
    matrix = torch.stack(
        [torch.linalg.vecdot((codes[:, g] @ blocks[g]).view_as(codes), codes) for g in range(groups)], dim=1
    ).double()
    target = torch.linalg.vecdot((weight @ hessian).view_as(codes), codes).double()
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30
    scale = torch.linalg.solve(matrix, target).to(rounded.scale.dtype)
    change = scale / rounded.scale
    sound = ((change > SMALLEST_CHANGE) & (change < 1 / SMALLEST_CHANGE)).all(1, keepdim=True)
    return torch.where(sound, scale, rounded.scale)
