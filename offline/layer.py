"""One decoder layer's weights to codes, scales and clips."""

import torch

from infoquant_vllm.format import ActivationArgs, InputTransform, ModelShape, activation_groups, pack_codes
from offline.clip_search import search_clips
from offline.gptq import gptq, output_error
from offline.recipe import SITES, Recipe, Site
from offline.refine import refine
from offline.transforms import InputTensors, transform_hessian, transform_input, undo_in_weights
from offline.weights import QuantizedWeight, round_to_nearest


def quantize_layer(
    state: dict[str, torch.Tensor],
    hessians: dict[str, torch.Tensor] | None,
    samples: dict[str, torch.Tensor],
    inputs: dict[str, InputTensors],
    keys: torch.Tensor | None,
    recipe: Recipe,
    shape: ModelShape,
    dtype: torch.dtype,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The checkpoint's tensors of one layer, and the output error of each linear where GPTQ rounds.

    state: the layer as `fold_layer` gives it, float32; names are local to the layer, here and in the results
    hessians: of the inputs before their transforms, by each site's first linear; None rounds to nearest
    samples: some inputs before their transforms [tokens, features], by each site's first linear, for clip searches
    inputs: tensors of the sites' input transforms, by site; each linear gets a copy
    keys: their offset [kv_heads, head_dim], where the recipe has one
    dtype: of the norms and biases, which stay unquantised
    """
    tensors = {name: tensor.to(dtype) for name, tensor in state.items() if not name.endswith("_proj.weight")}
    errors: dict[str, float] = {}
    for name, linears in SITES.items():
        site: Site = getattr(recipe.sites, name)
        transform, tensors_of_input = recipe.input_transform(name, shape), inputs.get(name, {})
        weights = [undo_in_weights(state[f"{linear}.weight"], transform, tensors_of_input) for linear in linears]
        hessian = None
        if hessians is not None:
            hessian = transform_hessian(hessians[linears[0]], transform, tensors_of_input)
        args, features = recipe.input_activations(name, shape), weights[0].shape[1]
        clip = _input_clip(site.clip, args, features, samples.get(linears[0]), transform, tensors_of_input)
        for linear, weight, rounded in zip(linears, weights, _round(weights, hessian, site, recipe), strict=True):
            tensors |= {f"{linear}.{key}": t for key, t in _linear_tensors(rounded, site).items()}
            tensors |= {f"{linear}.{key}": t.clone() for key, t in (tensors_of_input | clip).items()}
            if hessian is not None:
                errors[linear] = output_error(weight, rounded.values(), hessian)
    return tensors | _cache_tensors(recipe, keys, shape), errors


def _round(
    weights: list[torch.Tensor], hessian: torch.Tensor | None, site: Site, recipe: Recipe
) -> list[QuantizedWeight]:
    """Quantise linears that share an input in one go."""
    stacked = torch.cat(weights)
    if hessian is None:
        rounded = round_to_nearest(stacked, site.weights)
    else:
        rounded = gptq(stacked, hessian, site.weights, recipe.gptq.damping)
        rounded = refine(stacked, rounded, hessian, site.weights, recipe.gptq.refinements)
    return rounded.split([len(weight) for weight in weights])


def _input_clip(
    clip: float | str,
    args: ActivationArgs,
    features: int,
    sample: torch.Tensor | None,
    transform: InputTransform,
    tensors: InputTensors,
) -> dict[str, torch.Tensor]:
    """The factors on the ranges of an input, where it has any."""
    if args.num_bits == 16:
        return {}
    groups = activation_groups(args, features)
    if not isinstance(clip, str):
        return {"input_clip": torch.full((groups, 2), clip)}
    assert sample is not None  # such recipes need calibration
    return {"input_clip": search_clips(transform_input(sample, transform, tensors), args, groups)}


def _linear_tensors(weight: QuantizedWeight, site: Site) -> dict[str, torch.Tensor]:
    args = site.weights
    tensors = {
        "weight_packed": pack_codes(weight.codes, args.num_bits, signed=args.symmetric),
        "weight_scale": weight.scale,
    }
    if not args.symmetric:
        tensors["weight_zero_point"] = weight.zero.to(torch.uint8)
    return tensors


def _cache_tensors(recipe: Recipe, keys: torch.Tensor | None, shape: ModelShape) -> dict[str, torch.Tensor]:
    if recipe.kv_cache is None:
        return {}
    size = (shape.num_key_value_heads, 2)
    tensors = {
        "self_attn.attn.key_clip": torch.full(size, recipe.kv_cache.key_clip),
        "self_attn.attn.value_clip": torch.full(size, recipe.kv_cache.value_clip),
    }
    return tensors if keys is None else tensors | {"self_attn.attn.key_offset": keys}


def local_tensors(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    """A module's tensors out of those of its layer, by their names inside the module."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
