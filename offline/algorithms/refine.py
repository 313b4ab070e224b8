"""Refine rounded weights: codes and multipliers by coordinate descent, and the scale of each row in closed form.

Every step lowers tr((W - Q) H (W - Q)^T), the squared error of the outputs, and never raises it. The first is cyclic
coordinate descent over the codes, one input at a time (Behdin et al., "QuantEase", arXiv 2309.01885, section 3.2); the
second does the same over the multipliers of the groups and, last, solves for the scale that they share.
"""

import dataclasses

import torch

from infoquant_vllm.format import WeightArgs
from offline.algorithms.rtn import QuantizedWeight, Steps, largest_multiplier

BLOCK = 32
ROWS_AT_A_TIME = 8192
"""Rows that are refined together; bounds peak memory."""
SYSTEM_ELEMENTS = 2**24
"""Elements of the products of groups that are held together; a row with G groups has G^2."""
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
            part = refit_scales(own, descend(own, part, hessian, args), hessian, args)  # noqa: PLW2901
        parts.append(part)
    return QuantizedWeight(*(torch.cat(tensors) for tensors in zip(*map(dataclasses.astuple, parts), strict=True)))


def descend(weight: torch.Tensor, rounded: QuantizedWeight, hessian: torch.Tensor, args: WeightArgs) -> QuantizedWeight:
    """Set every code once, in order, to the best one given all others."""
    groups = rounded.zero.shape[1]
    size = weight.shape[1] // groups
    codes = rounded.codes.T.clone(
        memory_format=torch.contiguous_format
    )  # [K, N]: rows that change together are contiguous
    difference = (weight - rounded.values()).T.contiguous()
    gradient = hessian @ difference
    for group in range(groups):
        steps = rounded.steps(group, args)
        for start in range(group * size, (group + 1) * size, BLOCK):
            part = slice(start, min(start + BLOCK, (group + 1) * size))
            own, before = hessian[part, part], difference[part].clone()
            _descend_block(weight.T[part], codes[part], difference[part], gradient[part].clone(), own, steps)
            gradient.addmm_(hessian[:, part], difference[part] - before)
    return dataclasses.replace(rounded, codes=codes.T.contiguous())


def _descend_block(
    weight: torch.Tensor,
    codes: torch.Tensor,
    difference: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    steps: Steps,
) -> None:
    """Update codes and difference [B, N] of B inputs in place; `gradient` [B, N] is their rows of H (W - Q)."""
    for index, row in enumerate(weight):
        target = row - difference[index] + gradient[index] / hessian[index, index]
        codes[index] = steps.codes(target)
        found = row - steps.values(codes[index])
        gradient.addr_(hessian[:, index], found - difference[index])
        difference[index] = found


def refit_scales(
    weight: torch.Tensor, rounded: QuantizedWeight, hessian: torch.Tensor, args: WeightArgs
) -> QuantizedWeight:
    """Set every multiplier to the best one given all others, then solve for the rows' scales; codes stay.

    With C_g the codes minus zero-points of group g and 0 elsewhere, the error of a row is
    sum_gh m_g m_h s^2 C_g H C_h^T - 2 sum_g m_g s C_g H w^T and a constant.
    """
    rows = max(1, SYSTEM_ELEMENTS // rounded.zero.shape[1] ** 2)
    parts = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    found = [_refit_rows(weight[part], rounded.rows(part), hessian, args) for part in parts]
    scale, multiplier = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return QuantizedWeight(rounded.codes, scale, multiplier, rounded.zero)


def _refit_rows(
    weight: torch.Tensor, rounded: QuantizedWeight, hessian: torch.Tensor, args: WeightArgs
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = rounded.zero.shape[1]
    codes = rounded.codes.unflatten(1, (groups, -1)) - rounded.zero[:, :, None]  # [N, G, K / G]
    blocks = hessian.view(groups, codes.shape[2], -1)
    products = torch.stack(
        [torch.linalg.vecdot((codes[:, g] @ blocks[g]).view_as(codes), codes) for g in range(groups)], dim=1
    ).double()
    target = torch.linalg.vecdot((weight @ hessian).view_as(codes), codes).double()
    multiplier, scale = rounded.multiplier.double(), rounded.scale.double()
    if groups > 1:
        largest = largest_multiplier(rounded.zero, args)
        for g in range(groups):
            own = products[:, g, g]
            rest = target[:, g] / scale[:, 0] - torch.linalg.vecdot(products[:, g], multiplier)
            best = (multiplier[:, g] + rest / own).round_().clamp_(min=1).minimum(largest[:, g])
            multiplier[:, g] = torch.where(own > 0, best, multiplier[:, g])
    fitted = torch.linalg.vecdot(target, multiplier) / torch.einsum("ng,ngh,nh->n", multiplier, products, multiplier)
    change = fitted[:, None] / scale
    sound = (change > SMALLEST_CHANGE) & (change < 1 / SMALLEST_CHANGE)
    return torch.where(sound, fitted[:, None], scale).to(rounded.scale.dtype), multiplier.to(rounded.multiplier.dtype)
