"""Summarize a measurement and the run's report in numbers and words."""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from infoquant_vllm.format import SITES, Checkpoint, FormatError, KVCacheArgs
from offline.errors import ToolError
from offline.evaluate.inspect import Inspection, scheme_words
from offline.evaluate.metrics import Figure
from offline.evaluate.page.distribution import SiteFigures
from offline.evaluate.page.measure import BySite, Measurement
from offline.output.report import REPORT_FILE, Report

LABELS = {
    "qkv": "q, k, v input",
    "o": "o_proj input",
    "gate_up": "gate, up input",
    "down": "down_proj input",
    "k": "K of the cache",
    "v": "V of the cache",
}
"""Names of the sites on the page."""


class LayerFigures(BaseModel):
    """The scalars of `SiteFigures` by layer; NaN for a layer of zeros."""

    model_config = ConfigDict(frozen=True)

    range: list[float]
    entropy: list[float]
    error: list[float | None]


class Worst(BaseModel):
    """The place with the largest error."""

    model_config = ConfigDict(frozen=True)

    layer: int
    place: str
    error: float


class Summary(BaseModel):
    """All numbers of a page but its histograms; `before` is None without a source."""

    model_config = ConfigDict(frozen=True)

    page: str
    source: str | None
    text: str
    windows: int
    tokens: int
    figures: dict[str, Figure]
    after: dict[str, LayerFigures]
    before: dict[str, LayerFigures] | None
    weight_errors: dict[str, list[float]]
    """Share of the energy of each linear's output that rounding lost, by layer; NaN where unknown."""
    worst_input: Worst | None
    worst_weight: Worst | None


def summarize(found: Measurement, records: Report | None, layers: int, **names: Any) -> Summary:
    """Summarize a measurement and the run's report; `names` are the page, source and text."""
    weight_errors = _weight_errors(records, layers)
    errors = {site: [_number(layer.error) for layer in figures] for site, figures in found.after.items()}
    return Summary(
        windows=found.windows,
        tokens=found.tokens,
        figures=found.figures,
        after=_by_layer(found.after),
        before=None if found.before is None else _by_layer(found.before),
        weight_errors=weight_errors,
        worst_input=_worst(errors),
        worst_weight=_worst(weight_errors),
        **names,
    )


def run_records(inspection: Inspection) -> Report | None:
    """Return the run's report; raise ToolError where the checkpoint's file is not one."""
    if inspection.report is None:
        return None
    try:
        return Report.model_validate(inspection.report)
    except ValidationError as error:
        file = f"{inspection.checkpoint}/{REPORT_FILE}"
        raise ToolError(str(FormatError.from_validation(file, error))) from None


def site_words(checkpoint: Checkpoint, site: str) -> tuple[str, str, str]:
    """Describe weights, inputs and input transform of a site, with every variant among its layers."""
    if site not in SITES:
        cache = checkpoint.config.kv_cache
        assert cache is not None
        steps = ["centered"] * cache.key_mean + [cache.key_transform] if site == "k" else ["none"]
        return "", f"{_cache_bits(cache, site)} bits, asymmetric, per token and head", ", ".join(steps)
    modules = [f"model.layers.{layer}.{SITES[site][0]}" for layer in range(checkpoint.shape.num_hidden_layers)]
    ways = dict.fromkeys(scheme_words(checkpoint.config.scheme(module)) for module in modules)
    weights, inputs, transforms = (" / ".join(dict.fromkeys(words)) for words in zip(*ways, strict=True))
    return weights, inputs, transforms


def site_bits(checkpoint: Checkpoint, site: str) -> list[int]:
    """Return the bits of a site by layer, 16 where unquantized."""
    layers = range(checkpoint.shape.num_hidden_layers)
    if site not in SITES:
        cache = checkpoint.config.kv_cache
        return [16 if cache is None else _cache_bits(cache, site) for _ in layers]
    schemes = [checkpoint.config.scheme(f"model.layers.{layer}.{SITES[site][0]}") for layer in layers]
    return [16 if scheme is None else scheme.input_activations.num_bits for scheme in schemes]


def _cache_bits(cache: KVCacheArgs, site: str) -> int:
    return cache.key_bits if site == "k" else cache.value_bits


def mean(values: list[float] | list[float | None]) -> float:
    """Return the mean of the values that are numbers; NaN without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _by_layer(by_site: BySite) -> dict[str, LayerFigures]:
    def scalars(layers: list[SiteFigures]) -> LayerFigures:
        columns = {name: [getattr(layer, name) for layer in layers] for name in LayerFigures.model_fields}
        return LayerFigures(**columns)

    return {site: scalars(layers) for site, layers in by_site.items()}


def _weight_errors(records: Report | None, layers: int) -> dict[str, list[float]]:
    """Return rounding errors by linear; names in the report are untrusted, so only known ones are read."""
    if records is None or not records.errors:
        return {}
    names = [linear for linears in SITES.values() for linear in linears]
    return {
        name.split(".")[-1]: [records.errors.get(f"model.layers.{layer}.{name}", math.nan) for layer in range(layers)]
        for name in names
    }


def _worst(errors: dict[str, list[float]]) -> Worst | None:
    known = [
        Worst(layer=layer, place=place, error=error)
        for place, values in errors.items()
        for layer, error in enumerate(values)
        if math.isfinite(error)
    ]
    return max(known, key=lambda worst: worst.error, default=None)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
