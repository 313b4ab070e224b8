"""Rounded weights made better where they are: codes one input at a time, scales in closed form.

Both steps lower tr((W - Q) H (W - Q)^T), the error of the outputs, and never raise it. The first is
cyclic coordinate descent over the codes (Behdin et al., "QuantEase", arXiv 2309.01885, section 3.2);
the second solves for all scales of a row with its codes fixed, which is linear least squares.
"""

import torch

from infoquant_vllm.format import WeightArgs
from offline.algorithms.rtn import QuantizedWeight, Scales, code_range

BLOCK = 32
ROWS_AT_A_TIME = 8192
SYSTEM_ELEMENTS = 2**24
"""Of the systems of equations that are solved together: a row with G groups has G^2."""
REGULARIZATION = 1e-4
"""Share of the Hessian's mean diagonal that is added to it: inputs that hardly occur stay near their weights."""
SMALLEST_CHANGE = 0.5
"""Of a scale, as a factor: solutions below it, or above its inverse, come from groups that hardly matter."""


def refine(
    weight: torch.Tensor, rounded: QuantizedWeight, hessian: torch.Tensor, args: WeightArgs, passes: int
) -> QuantizedWeight:
    """`rounded` after `passes` of both steps; weight [N, K] float32, hessian [K, K] as in `gptq`."""
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
    """Every code once, in order, set to the best one for the others as they stand."""
    lowest, highest = code_range(args)
    groups = rounded.scale.shape[1]
    size = weight.shape[1] // groups
    codes = rounded.codes.T.clone(memory_format=torch.contiguous_format)  # [K, N]: what moves together lies together
    difference = (weight - rounded.values()).T.contiguous()
    pull = hessian @ difference
    for group in range(groups):
        scales = Scales(rounded.scale[:, group], rounded.zero[:, group], lowest, highest)
        for start in range(group * size, (group + 1) * size, BLOCK):
            part = slice(start, min(start + BLOCK, (group + 1) * size))
            own, before = hessian[part, part], difference[part].clone()
            _descend_block(weight.T[part], codes[part], difference[part], pull[part].clone(), own, scales)
            pull.addmm_(hessian[:, part], difference[part] - before)
    return QuantizedWeight(codes.T.contiguous(), rounded.scale, rounded.zero)


def _descend_block(
    weight: torch.Tensor,
    codes: torch.Tensor,
    difference: torch.Tensor,
    pull: torch.Tensor,
    hessian: torch.Tensor,
    scales: Scales,
) -> None:
    """Change codes and difference [B, N] of B inputs in place; `pull` [B, N] is their rows of H (W - Q)."""
    for index, row in enumerate(weight):
        wanted = row - difference[index] + pull[index] / hessian[index, index]
        codes[index] = scales.codes(wanted)
        found = row - scales.values(codes[index])
        pull.addr_(hessian[:, index], found - difference[index])
        difference[index] = found


def refit_scales(weight: torch.Tensor, rounded: QuantizedWeight, hessian: torch.Tensor) -> QuantizedWeight:
    """The scales [N, G] that minimize the error with codes and zero points as they are.

    With C_g the codes less zeros of group g and 0 elsewhere: sum_h (C_g H C_h^T) s_h = C_g H w^T.
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
