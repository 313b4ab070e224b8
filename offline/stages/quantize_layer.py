"""Quantize one decoder layer: weights, clip ratios and the tensors of its KV cache."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from infoquant_vllm.format import ActivationArgs, InputTransform, ModelShape, WeightArgs, activation_groups, pack_codes
from offline.algorithms.clip_search import search_clips
from offline.algorithms.fake_quantize import fake_quantize
from offline.algorithms.gptq import gptq, output_error
from offline.algorithms.refine import refine
from offline.algorithms.rotations import InputTensors, transform_hessian, transform_input, undo_in_weights
from offline.algorithms.rtn import QuantizedWeight, round_to_nearest
from offline.algorithms.sinks import Sinks
from offline.model.input_statistics import WeightedRows
from offline.recipe import Gptq, KVCache, Recipe

SINK_SITE = "qkv"
"""Every later token reads the keys and values of the first one, so its errors count more here."""


@dataclass
class LayerInputs:
    """Inputs of `quantize_layer` and `quantize_sites`, all by names inside the layer.

    `quantize_sites` takes weights, Hessians and samples out as their turn comes, so that memory falls as it proceeds.

    index: of the layer in the decoder
    state: the layer's tensors, as `fold_layer` returns them, float32
    hessians: of the inputs before their transforms, by each site's first linear; None rounds to nearest
    samples: some inputs before their transforms [tokens, features], by each site's first linear, for clip searches
    sinks: inputs of first tokens before their transforms, by each site's first linear, where weights make up for their
        rounding; Hessians are of the other tokens then
    means: of the inputs before their transforms [features], by each site's first linear, where a site subtracts it;
        Hessians, samples and sinks are of inputs less the mean then
    transforms: tensors of the sites' input transforms, by site; each linear gets a copy
    clips: clip ratios of sites that were found elsewhere, by site
    folded_scales: what equalization scaled rows of linears by (see `Scales`)
    key_mean, key_feedback: [kv_heads, head_dim] and [kv_heads, head_dim, head_dim], where the recipe has them
    """

    index: int
    state: dict[str, torch.Tensor]
    hessians: dict[str, torch.Tensor] | None = None
    samples: dict[str, torch.Tensor] = field(default_factory=dict)
    sinks: dict[str, WeightedRows] = field(default_factory=dict)
    means: dict[str, torch.Tensor] = field(default_factory=dict)
    transforms: dict[str, InputTensors] = field(default_factory=dict)
    clips: dict[str, torch.Tensor] = field(default_factory=dict)
    folded_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    key_mean: torch.Tensor | None = None
    key_feedback: torch.Tensor | None = None


@dataclass(frozen=True)
class _SiteInput:
    """The shared input of a site: its transform, and what is known of the values before the transform."""

    transform: InputTransform
    tensors: InputTensors
    hessian: torch.Tensor | None
    sample: torch.Tensor | None
    sinks: WeightedRows | None
    clips: torch.Tensor | None
    mean: torch.Tensor | None


def quantize_layer(
    layer: LayerInputs, recipe: Recipe, shape: ModelShape, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the checkpoint's tensors of one layer, and the output error of each linear where GPTQ rounds.

    The experts that a router chooses are left out.

    dtype: of norms, biases and routers, which stay unquantized, and of weights that do
    """
    plain = recipe.rounding == "none"
    quantized = set() if plain else {f"{linear}.weight" for linear in shape.layer_linears}
    tensors = {name: tensor.to(dtype) for name, tensor in layer.state.items() if name not in quantized}
    sites = [site for site, linears in shape.sites.items() if not plain and f"{linears[0]}.weight" in layer.state]
    found, errors = quantize_sites(layer, sites, recipe, shape)
    return tensors | found | _cache_tensors(recipe.kv_cache, layer, shape), errors


def quantize_sites(
    layer: LayerInputs, sites: Iterable[str], recipe: Recipe, shape: ModelShape
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the checkpoint's tensors of the linears of some sites, and the output error of each."""
    tensors: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    for site in sites:
        linears = shape.sites[site]
        shared_input = _SiteInput(
            recipe.input_transform(site, shape),
            layer.transforms.get(site, {}),
            None if layer.hessians is None else layer.hessians.pop(linears[0]),
            layer.samples.pop(linears[0], None),
            layer.sinks.pop(linears[0], None),
            layer.clips.get(site),
            layer.means.get(linears[0]),
        )
        weights = [layer.state.pop(f"{linear}.weight") for linear in linears]
        if shared_input.mean is not None:
            means = (weight @ shared_input.mean for weight in weights)
            tensors |= {f"{linear}.output_mean": mean for linear, mean in zip(linears, means, strict=True)}
        inputs = _input_tensors(site, layer.index, shared_input, recipe, shape)
        factor = recipe.gptq.sink_weight if site == SINK_SITE else 1.0
        sinks = _sinks(shared_input, inputs, recipe.input_activations(site, shape, layer.index), factor)
        args = recipe.site(site, layer.index).weights
        rounded = _quantize_weights(args, weights, shared_input, sinks, recipe.gptq)
        for linear, (part, error) in zip(linears, rounded, strict=True):
            tensors |= {f"{linear}.{key}": tensor for key, tensor in part.items()}
            errors |= {} if error is None else {linear: error}
        tensors |= {f"{linear}.{key}": tensor.clone() for linear in linears for key, tensor in inputs.items()}
    return tensors, errors


def _quantize_weights(
    args: WeightArgs,
    weights: list[torch.Tensor],
    shared_input: _SiteInput,
    sinks: Sinks | None,
    rounding: Gptq,
) -> list[tuple[dict[str, torch.Tensor], float | None]]:
    """Return codes and scales of each linear of a site, and its error; overwrites weights and Hessian."""
    rows, hessian = [len(weight) for weight in weights], shared_input.hessian
    undone = [undo_in_weights(weights.pop(0), shared_input.transform, shared_input.tensors) for _ in rows]
    weight = torch.cat(undone)
    del undone
    if hessian is not None:
        hessian = transform_hessian(hessian, shared_input.transform, shared_input.tensors)
        if sinks is not None:
            weight += sinks.correction(weight, hessian)
            hessian = sinks.added_to(hessian)
    parts = _round(weight, hessian, args, rounding).split(rows)
    return [
        (_linear_tensors(rounded, args), None if hessian is None else output_error(part, rounded, hessian))
        for part, rounded in zip(weight.split(rows), parts, strict=True)
    ]


def _sinks(
    shared_input: _SiteInput, inputs: dict[str, torch.Tensor], args: ActivationArgs, factor: float
) -> Sinks | None:
    """Return the inputs of first tokens as they are and as the server rounds them, their weights times `factor`."""
    if shared_input.sinks is None:
        return None
    rows, weights = shared_input.sinks
    exact = transform_input(rows, shared_input.transform, shared_input.tensors).contiguous()
    ratio = inputs.get("input_clip_ratio")
    rounded = exact if ratio is None else fake_quantize(exact, ratio.to(exact), args)
    return Sinks(exact, rounded, factor * weights)


def _round(weight: torch.Tensor, hessian: torch.Tensor | None, args: WeightArgs, rounding: Gptq) -> QuantizedWeight:
    """Quantize the rows of all linears of a site together."""
    if hessian is None:
        return round_to_nearest(weight, args)
    rounded = gptq(weight, hessian, args, rounding.dampening_frac)
    return refine(weight, rounded, hessian, args, rounding.refinements)


def _input_tensors(
    site: str, layer: int, shared_input: _SiteInput, recipe: Recipe, shape: ModelShape
) -> dict[str, torch.Tensor]:
    """Return the transform, the mean and the clip ratios of a site's input."""
    args, clip_ratio = recipe.input_activations(site, shape, layer), recipe.site(site, layer).clip_ratio
    tensors = dict(shared_input.tensors)
    if shared_input.mean is not None:
        mean = transform_input(shared_input.mean[None], shared_input.transform, shared_input.tensors)
        tensors["input_mean"] = mean[0]
    if args.num_bits != 16:
        if clip_ratio != "search":
            tensors["input_clip_ratio"] = torch.full((activation_groups(args, shape.features(site)), 2), clip_ratio)
        elif shared_input.clips is not None:
            tensors["input_clip_ratio"] = shared_input.clips
        else:
            assert shared_input.sample is not None  # such recipes need calibration
            y = transform_input(shared_input.sample, shared_input.transform, shared_input.tensors)
            tensors["input_clip_ratio"] = search_clips(y, args)
    return tensors


def _linear_tensors(weight: QuantizedWeight, args: WeightArgs) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": pack_codes(weight.codes, args.num_bits, signed=args.symmetric),
        "weight_scale": weight.scale,
    }
    if args.group_size is not None:
        tensors["weight_multiplier"] = weight.multiplier.to(torch.uint8)
    if not args.symmetric:
        tensors["weight_zero_point"] = weight.zero.to(torch.uint8)
    return tensors


def _cache_tensors(args: KVCache | None, layer: LayerInputs, shape: ModelShape) -> dict[str, torch.Tensor]:
    if args is None:
        return {}
    size = (shape.num_key_value_heads, 2)
    tensors = {
        "self_attn.attn.key_clip_ratio": torch.full(size, args.key_clip_ratio),
        "self_attn.attn.value_clip_ratio": torch.full(size, args.value_clip_ratio),
    }
    for name, tensor in {"key_mean": layer.key_mean, "key_feedback": layer.key_feedback}.items():
        if tensor is not None:
            tensors[f"self_attn.attn.{name}"] = tensor
    return tensors
