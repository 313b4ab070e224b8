"""Sums over the inputs of a layer's linears, which GPTQ, equalization and clip searches read."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

HESSIAN_ROWS = 1024
"""Rows of a Hessian that are mirrored at once; bounds peak memory."""
SAMPLE_STRIDE = 16
"""One in so many tokens is kept as a sample."""


class WeightedRows(NamedTuple):
    """Inputs [tokens, features] and the weights of the tokens [tokens]."""

    rows: torch.Tensor
    weights: torch.Tensor


class InputStatistics:
    """Statistics of the inputs x [tokens, features] of modules, by the modules' names.

    token_weights: weights of all tokens that will be observed, [tokens] of mean 1, by module; 1 where there are none
    sink_stride: length of sequences whose first tokens, the sinks, have weight 0 and are kept; None: none are
    hessians: weighted sums of x^T x, [features, features]; half the Hessian of the squared error, a factor that GPTQ
        ignores
    second_moments: per-channel sums of x^2 / |x|^2, [features]; every token counts the same
    sums: weighted sums of x, [features]
    tokens: sum of weights
    samples: [tokens / stride, features], evenly spaced tokens
    """

    def __init__(
        self,
        token_weights: Mapping[str, torch.Tensor] = MappingProxyType({}),
        stride: int = SAMPLE_STRIDE,
        sink_stride: int | None = None,
    ) -> None:
        self._token_weights, self._stride, self._sink_stride = token_weights, stride, sink_stride
        self._observed: dict[str, int] = {}
        self._upper: dict[str, torch.Tensor] = {}
        self.second_moments: dict[str, torch.Tensor] = {}
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, float] = {}
        self._samples: dict[str, list[torch.Tensor]] = {}
        self._sinks: dict[str, list[WeightedRows]] = {}

    def observe(self, module: str, x: torch.Tensor) -> None:
        """Add inputs x [tokens, features] float32; an `Observer`."""
        features = x.shape[1]
        if module not in self._upper:
            self._upper[module], self.second_moments[module] = x.new_zeros(features, features), x.new_zeros(features)
            self.sums[module], self.tokens[module], self._observed[module] = x.new_zeros(features), 0.0, 0
            self._samples[module], self._sinks[module] = [], []
        weights = self._weights(module, x)
        weighted = x if weights is None else x * weights[:, None]
        strip = max(64, -(-features // 4))
        for start in range(0, features, strip):  # the upper triangle alone, strip by strip
            self._upper[module][start : start + strip, start:].addmm_(
                weighted[:, start : start + strip].T, x[:, start:]
            )
        inverse_energy = 1 / x.square().sum(1).clamp(min=torch.finfo(x.dtype).tiny)
        self.second_moments[module] += inverse_energy @ x.square()
        self.sums[module] += weighted.sum(0)
        self.tokens[module] += len(x) if weights is None else weights.sum().item()
        self._observed[module] += len(x)
        self._samples[module].append(x[:: self._stride].clone())

    def _weights(self, module: str, x: torch.Tensor) -> torch.Tensor | None:
        """Return the weights of the next tokens [tokens], None if all are 1; keeps the sinks among them."""
        where = slice(self._observed[module], self._observed[module] + len(x))
        weights = self._token_weights[module][where].to(x.device) if module in self._token_weights else None
        if self._sink_stride is None:
            return weights
        weights = x.new_ones(len(x)) if weights is None else weights
        sinks = torch.arange(where.start, where.stop, device=x.device) % self._sink_stride == 0
        self._sinks[module].append(WeightedRows(x[sinks], weights[sinks]))
        return weights.masked_fill(sinks, 0)

    def take_hessians(self) -> dict[str, torch.Tensor]:
        """Return the whole symmetric matrices and drop them here, so that the caller can free them one by one."""
        found, self._upper = self._upper, {}
        for matrix in found.values():
            _mirror(matrix)
        return found

    def samples(self) -> dict[str, torch.Tensor]:
        """Return the sampled inputs."""
        return {module: torch.cat(parts) for module, parts in self._samples.items()}

    def sinks(self) -> dict[str, WeightedRows]:
        """Return the inputs of first tokens, if they are kept."""
        found = {module: zip(*parts, strict=True) for module, parts in self._sinks.items() if parts}
        return {module: WeightedRows(*map(torch.cat, columns)) for module, columns in found.items()}

    def scale(self, module: str, scale: torch.Tensor) -> None:
        """Multiply rows and sums of a module's inputs by `scale` [features], as its weights were divided by it."""
        self._samples[module] = [part * scale for part in self._samples[module]]
        self._sinks[module] = [part._replace(rows=part.rows * scale) for part in self._sinks[module]]
        self.sums[module] *= scale

    def subtract_mean(self, module: str, hessian: torch.Tensor) -> torch.Tensor:
        """Make rows and `hessian` those of a module's inputs less their mean; return the mean [features]."""
        mean = self.sums[module] / self.tokens[module]
        hessian.addr_(self.sums[module], mean, alpha=-1)
        self._samples[module] = [part - mean for part in self._samples[module]]
        self._sinks[module] = [part._replace(rows=part.rows - mean) for part in self._sinks[module]]
        return mean


def _mirror(matrix: torch.Tensor) -> None:
    """Copy the upper triangle of a matrix [n, n] to the lower one, in place."""
    for start in range(0, len(matrix), HESSIAN_ROWS):
        stop = start + HESSIAN_ROWS
        square = matrix[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
