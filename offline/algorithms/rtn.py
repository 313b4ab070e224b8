"""Round weights to nearest (RTN), with scales from a search over clipped ranges."""

from dataclasses import dataclass

import torch

from infoquant_vllm.format import WeightArgs

CLIP_GRID = tuple(1.0 - 0.025 * step for step in range(21))
ELEMENTS_AT_A_TIME = 2**16
"""Weights searched together: few enough for a processor's cache, enough to hide the cost of a call."""


@dataclass(frozen=True)
class Scales:
    """value = (code - zero) * scale, lowest <= code <= highest; tensors of one size per row."""

    scale: torch.Tensor
    zero: torch.Tensor
    lowest: int
    highest: int

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes, in the dtype of `weight`, which broadcasts against the scales."""
        return (weight / self.scale).round_().add_(self.zero).clamp_(self.lowest, self.highest)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Dequantize codes."""
        return (codes - self.zero) * self.scale


@dataclass(frozen=True)
class QuantizedWeight:
    """codes [N, K] (signed where symmetric, as floats), scale [N, G] float32, zero [N, G]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def values(self) -> torch.Tensor:
        """Return the dequantized weights, [N, K] float32."""
        groups = self.scale.shape[1]
        codes = self.codes.unflatten(1, (groups, -1))
        return ((codes - self.zero[:, :, None]) * self.scale[:, :, None]).flatten(1)

    def rows(self, part: slice) -> "QuantizedWeight":
        """Select rows."""
        return QuantizedWeight(self.codes[part], self.scale[part], self.zero[part])

    def split(self, rows: list[int]) -> list["QuantizedWeight"]:
        """Split into parts of that many rows."""
        parts = zip(self.codes.split(rows), self.scale.split(rows), self.zero.split(rows), strict=True)
        return [QuantizedWeight(*part) for part in parts]


def search_scales(weight: torch.Tensor, args: WeightArgs) -> Scales:
    """Return scales [N, 1] for rows [N, K], the clip ratio of each row chosen by its squared error."""
    rows = len(weight) if weight.device.type != "cpu" else max(1, ELEMENTS_AT_A_TIME // weight.shape[1])
    parts = [_search_rows(part.contiguous(), args) for part in weight.split(rows)]
    scale, zero = (torch.cat([getattr(part, name) for part in parts]) for name in ("scale", "zero"))
    return Scales(scale, zero, parts[0].lowest, parts[0].highest)


def _search_rows(weight: torch.Tensor, args: WeightArgs) -> Scales:
    best = _scales(weight, args, 1.0)
    lowest_error = torch.full_like(best.scale, torch.inf)
    scale, zero = best.scale, best.zero
    for factor in CLIP_GRID:
        candidate = _scales(weight, args, factor)
        error = candidate.values(candidate.codes(weight)).sub_(weight).square_().sum(1, keepdim=True)
        better = error < lowest_error
        lowest_error = torch.where(better, error, lowest_error)
        scale, zero = torch.where(better, candidate.scale, scale), torch.where(better, candidate.zero, zero)
    return Scales(scale, zero, best.lowest, best.highest)


def round_to_nearest(weight: torch.Tensor, args: WeightArgs) -> QuantizedWeight:
    """Quantize weight [N, K] float32 without calibration."""
    size = args.group_size or weight.shape[1]
    parts = []
    for columns in weight.split(size, dim=1):
        scales = search_scales(columns, args)
        parts.append((scales.codes(columns), scales.scale, scales.zero))
    codes, scale, zero = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    return QuantizedWeight(codes, scale, zero)


def code_range(args: WeightArgs) -> tuple[int, int]:
    """Return the lowest and the highest code."""
    half = 2 ** (args.num_bits - 1)
    return (-half, half - 1) if args.symmetric else (0, 2 * half - 1)


def _scales(weight: torch.Tensor, args: WeightArgs, factor: float) -> Scales:
    lowest, highest = code_range(args)
    if args.symmetric:
        scale = (weight.abs().amax(1, keepdim=True) * (factor / highest)).clamp(min=1e-12)
        return Scales(scale, torch.zeros_like(scale), lowest, highest)
    low = weight.amin(1, keepdim=True).clamp(max=0) * factor
    high = weight.amax(1, keepdim=True).clamp(min=0) * factor
    scale = ((high - low) / highest).clamp(min=1e-12)
    return Scales(scale, torch.round(-low / scale), lowest, highest)
