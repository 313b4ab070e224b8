"""Round weights to nearest (RTN), with scales from a search over clipped ranges.

The groups of a row share its float scale; each has a small integer as multiplier of it, so that
(code - zero) * multiplier is an int8 value: the two-level scales of VS-Quant (Dai et al., arXiv 2102.04503).
"""

import itertools
from dataclasses import dataclass

import torch

from infoquant_vllm.format import MAX_VALUE, WeightArgs

CLIP_GRID = tuple(1.0 - 0.025 * step for step in range(21))
ELEMENTS_AT_A_TIME = 2**16
"""Weights searched together: few enough for a processor's cache, enough to hide the cost of a call."""
MAX_MULTIPLIER = MAX_VALUE // 8
"""Largest multiplier of a group: some 4-bit code is at least 8 from its zero-point."""
SMALLEST_STEP = 1e-12


@dataclass(frozen=True)
class Steps:
    """value = (code - zero) * step, lowest <= code <= highest; tensors of one size per row."""

    step: torch.Tensor
    zero: torch.Tensor
    lowest: int
    highest: int

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes, in the dtype of `weight`, which broadcasts against the steps."""
        return (weight / self.step).round_().add_(self.zero).clamp_(self.lowest, self.highest)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Dequantize codes."""
        return (codes - self.zero) * self.step


@dataclass(frozen=True)
class QuantizedWeight:
    """value = (code - zero) * multiplier * scale.

    codes: [N, K], signed where symmetric
    scale: [N, 1] float32
    multiplier, zero: [N, G]; multipliers are 1 where G is 1

    All but the scale are integers, held as floats.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    multiplier: torch.Tensor
    zero: torch.Tensor

    def values(self) -> torch.Tensor:
        """Return the dequantized weights, [N, K] float32."""
        codes = self.codes.unflatten(1, (self.zero.shape[1], -1))
        return ((codes - self.zero[:, :, None]) * (self.scale * self.multiplier)[:, :, None]).flatten(1)

    def steps(self, group: int, args: WeightArgs) -> Steps:
        """Return the steps and zero-points [N] of a group."""
        return Steps(self.scale[:, 0] * self.multiplier[:, group], self.zero[:, group], *code_range(args))

    def rows(self, part: slice) -> "QuantizedWeight":
        """Select rows."""
        return QuantizedWeight(self.codes[part], self.scale[part], self.multiplier[part], self.zero[part])

    def split(self, rows: list[int]) -> list["QuantizedWeight"]:
        """Split into parts of that many rows."""
        stops = itertools.accumulate(rows)
        return [self.rows(slice(stop - count, stop)) for count, stop in zip(rows, stops, strict=True)]


def search_scales(weight: torch.Tensor, args: WeightArgs) -> torch.Tensor:
    """Return the scale of each row of weight [N, K]: [N, 1].

    With groups it is the smallest one that multiplies to the best step of every group.
    """
    grouped = weight if args.group_size is None else weight.reshape(-1, args.group_size)
    highest = code_range(args)[1]
    low, high = _range(grouped)
    widest = torch.maximum(-low, high) / highest if args.symmetric else (high - low) / highest
    widest.clamp_(min=SMALLEST_STEP)
    best = _best_steps(grouped, [widest * factor for factor in CLIP_GRID], args)
    if args.group_size is None:
        return best.step
    return (best.step / largest_multiplier(best.zero, args)).view(len(weight), -1).amax(1, keepdim=True)


def search_steps(weight: torch.Tensor, scale: torch.Tensor, args: WeightArgs) -> Steps:
    """Return the best steps [N, 1] of a group of features, weight [N, K]: multiples of the rows' scale [N, 1]."""
    if args.group_size is None:
        return _best_steps(weight, [scale], args)
    return _best_steps(weight, [scale * multiplier for multiplier in range(1, MAX_MULTIPLIER + 1)], args, scale)


def round_to_nearest(weight: torch.Tensor, args: WeightArgs) -> QuantizedWeight:
    """Quantize weight [N, K] float32 without calibration."""
    scale = search_scales(weight, args)
    groups = weight.split(args.group_size or weight.shape[1], dim=1)
    found = [search_steps(columns, scale, args) for columns in groups]
    codes = [steps.codes(columns) for steps, columns in zip(found, groups, strict=True)]
    return quantized_weight(torch.cat(codes, dim=1), scale, found)


def quantized_weight(codes: torch.Tensor, scale: torch.Tensor, found: list[Steps]) -> QuantizedWeight:
    """Put together a weight of codes [N, K] and the steps [N, 1] of each group, multiples of scale [N, 1]."""
    multiplier = torch.cat([steps.step for steps in found], dim=1).div_(scale).round_()
    return QuantizedWeight(codes, scale, multiplier, torch.cat([steps.zero for steps in found], dim=1))


def code_range(args: WeightArgs) -> tuple[int, int]:
    """Return the lowest and the highest code."""
    half = 2 ** (args.num_bits - 1)
    return (-half, half - 1) if args.symmetric else (0, 2 * half - 1)


def largest_multiplier(zero: torch.Tensor, args: WeightArgs) -> torch.Tensor:
    """Return the largest multiplier for which every code, less its zero-point, times it is an int8 value."""
    lowest, highest = code_range(args)
    return torch.floor(MAX_VALUE / torch.maximum(zero - lowest, highest - zero))


def _best_steps(
    weight: torch.Tensor, candidates: list[torch.Tensor], args: WeightArgs, scale: torch.Tensor | None = None
) -> Steps:
    """Choose a step for each row of weight [N, K] among `candidates` [N, 1] by the squared error.

    scale: [N, 1]; multiples of it that are too large for int8 values are left out
    """
    rows = len(weight) if weight.device.type != "cpu" else max(1, ELEMENTS_AT_A_TIME // weight.shape[1])
    found = []
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        own, ends = weight[part].contiguous(), _range(weight[part])
        chosen = Steps(candidates[0][part], torch.zeros_like(ends[0]), *code_range(args))
        least = torch.full_like(ends[0], torch.inf)
        for step in candidates:
            steps = Steps(step[part], _zero(*ends, step[part], args), *code_range(args))
            error = steps.values(steps.codes(own)).sub_(own).square_().sum(1, keepdim=True)
            if scale is not None:
                error.masked_fill_(steps.step > largest_multiplier(steps.zero, args) * scale[part] * 1.001, torch.inf)
            better = error < least
            least = torch.where(better, error, least)
            chosen = Steps(
                torch.where(better, steps.step, chosen.step),
                torch.where(better, steps.zero, chosen.zero),
                *code_range(args),
            )
        found.append(chosen)
    step, zero = (torch.cat([getattr(steps, name) for steps in found]) for name in ("step", "zero"))
    return Steps(step, zero, *code_range(args))


def _zero(low: torch.Tensor, high: torch.Tensor, step: torch.Tensor, args: WeightArgs) -> torch.Tensor:
    """Return zero-points; a step too small for the range clips both its ends by one factor."""
    if args.symmetric:
        return torch.zeros_like(step)
    highest = code_range(args)[1]
    return torch.round(-low * (highest / torch.maximum(high - low, step * highest)))


def _range(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the minimum and maximum of each row and 0: [N, 1] each."""
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    return low.clamp_(max=0), high.clamp_(min=0)
