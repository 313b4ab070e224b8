"""Collect how values that share a quantization scale are distributed."""

from dataclasses import dataclass

import torch

LEVELS = 16
BINS_PER_RMS = 8
HISTOGRAM_LIMIT = 64  # in RMS; one of n values is at most sqrt(n) RMS, larger ones (n > 4096) count in the last bin
BINS = 2 * HISTOGRAM_LIMIT * BINS_PER_RMS


@dataclass(frozen=True)
class Quantized:
    """Groups of values after quantization [groups, size], and their quantizers' outer levels [groups]."""

    values: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor


@dataclass(frozen=True)
class SiteFigures:
    """Figures of one quantizer, means over its groups.

    Range and entropy are the criteria of InfoQuant (arXiv 2605.26175): values are easy to quantize whose range is
    small and that are well dispersed inside it.
    """

    range: float
    """max(x, 0) - min(x, 0) in units of the group's RMS."""
    entropy: float
    """Bits, 0 to 4: entropy of the nearest of 16 levels spread evenly over that range."""
    error: float | None
    """|Q(x) - x|^2 / |x|^2, the noise of rounding and clipping; None where unquantized."""
    levels: tuple[float, float] | None
    """The quantizer's lowest and highest level in units of the RMS; None where unquantized."""
    density: torch.Tensor
    """Share of values per RMS from -HISTOGRAM_LIMIT to HISTOGRAM_LIMIT, [BINS] float64."""
    occupancy: torch.Tensor
    """Share of a group's values at each of the 16 levels, most used first, [LEVELS] float64."""


class Distribution:
    """Sum up groups of values for `figures`; groups of zeros are left out."""

    def __init__(self) -> None:
        self._groups = self._quantized = self._values = 0
        self._range = self._entropy = self._error = self._lowest = self._highest = 0.0
        self._histogram = torch.zeros(BINS, dtype=torch.float64)
        self._occupancy = torch.zeros(LEVELS, dtype=torch.float64)

    def add(self, groups: torch.Tensor, quantized: Quantized | None) -> None:
        """Add groups [groups, size] of floats, and the same groups after quantization."""
        energy = groups.double().square().mean(1)
        kept = energy.isfinite() & (energy > 0)
        rms = energy[kept].sqrt()
        unit = groups[kept].double() / rms[:, None]
        low, high = unit.amin(1).clamp(max=0), unit.amax(1).clamp(min=0)
        shares = _level_shares(unit, low, high)
        self._groups += len(unit)
        self._values += unit.numel()
        self._range += (high - low).sum().item()
        self._entropy += torch.special.entr(shares).sum().item() / torch.tensor(2.0).log().item()
        self._occupancy += shares.sort(dim=1, descending=True).values.sum(0)
        bins = ((unit + HISTOGRAM_LIMIT) * BINS_PER_RMS).floor().clamp(0, BINS - 1).long()
        self._histogram += bins.flatten().bincount(minlength=BINS)
        if quantized is not None:
            noise = quantized.values[kept].double() / rms[:, None] - unit
            self._quantized += len(unit)
            self._error += noise.square().mean(1).sum().item()
            self._lowest += (quantized.lowest[kept] / rms).sum().item()
            self._highest += (quantized.highest[kept] / rms).sum().item()

    def figures(self) -> SiteFigures:
        """Return means over all groups so far, NaN without any."""
        groups, quantized = self._groups or float("nan"), self._quantized
        return SiteFigures(
            range=self._range / groups,
            entropy=self._entropy / groups,
            error=self._error / quantized if quantized else None,
            levels=(self._lowest / quantized, self._highest / quantized) if quantized else None,
            density=self._histogram * BINS_PER_RMS / (self._values or float("nan")),
            occupancy=self._occupancy / groups,
        )


def _level_shares(unit: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Return the share of each group's values [groups, size] at each of its levels, [groups, LEVELS]."""
    steps = (unit - low[:, None]) * ((LEVELS - 1) / (high - low))[:, None]
    nearest = steps.round().clamp(0, LEVELS - 1).long()
    bins = nearest + LEVELS * torch.arange(len(unit), device=unit.device)[:, None]
    counts = bins.flatten().bincount(minlength=LEVELS * len(unit)).view(-1, LEVELS)
    return counts.double() / max(unit.shape[1], 1)
