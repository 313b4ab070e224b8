"""One decoder layer's weights to codes, scales and clips."""

import torch

from infoquant_vllm.format import SITES, ActivationArgs, InputTransform, ModelShape, activation_groups, pack_codes
from offline.algorithms.clip_search import search_clips
from offline.algorithms.gptq import gptq, output_error
from offline.algorithms.refine import refine
from offline.algorithms.rotations import InputTensors, transform_hessian, transform_input, undo_in_weights
from offline.algorithms.rtn import QuantizedWeight, round_to_nearest
from offline.recipe import Recipe, Site


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

    Uses up what it is given: weights, Hessians and samples are taken out as their turn comes, so that
    memory falls as the layer proceeds.

    state: the layer as `fold_layer` gives it, float32; names are local to the layer, here and in the results
    hessians: of the inputs before their transforms, by each site's first linear; None rounds to nearest
    samples: some inputs before their transforms [tokens, features], by each site's first linear, for clip searches
    inputs: tensors of the sites' input transforms, by site; each linear gets a copy
    keys: their offset [kv_heads, head_dim], where the recipe has one
    dtype: of the norms and biases, which stay unquantized
    """
    tensors = {name: tensor.to(dtype) for name, tensor in state.items() if not name.endswith("_proj.weight")}
    errors: dict[str, float] = {}
    for name, linears in SITES.items():
        weights = [state.pop(f"{linear}.weight") for linear in linears]
        hessian = None if hessians is None else hessians.pop(linears[0])
        sample = samples.pop(linears[0], None)
        tensors |= _quantize_site(name, weights, hessian, sample, inputs.get(name, {}), recipe, shape, errors)
    return tensors | _cache_tensors(recipe, keys, shape), errors


def _quantize_site(
    name: str,
    weights: list[torch.Tensor],
    hessian: torch.Tensor | None,
    sample: torch.Tensor | None,
    inputs: InputTensors,
    recipe: Recipe,
    shape: ModelShape,
    errors: dict[str, float],
) -> dict[str, torch.Tensor]:
    """Tensors of the linears that share an input; adds their errors. Weights and Hessian are overwritten."""
    linears, site = SITES[name], getattr(recipe.sites, name)
    tensors: dict[str, torch.Tensor] = {}
    transform = recipe.input_transform(name, shape)
    rows = [len(weight) for weight in weights]
    weight = torch.cat([undo_in_weights(weights.pop(0), transform, inputs) for _ in rows])
    if hessian is not None:
        hessian = transform_hessian(hessian, transform, inputs)
    args = recipe.input_activations(name, shape)
    clip = _input_clip_ratio(site.clip_ratio, args, weight.shape[1], sample, transform, inputs)
    parts = _round(weight, hessian, site, recipe).split(rows)
    for linear, part, rounded in zip(linears, weight.split(rows), parts, strict=True):
        tensors |= {f"{linear}.{key}": t for key, t in _linear_tensors(rounded, site).items()}
        tensors |= {f"{linear}.{key}": t.clone() for key, t in (inputs | clip).items()}
        if hessian is not None:
            errors[linear] = output_error(part, rounded, hessian)
    return tensors


def _round(weight: torch.Tensor, hessian: torch.Tensor | None, site: Site, recipe: Recipe) -> QuantizedWeight:
    """Quantize the rows of linears that share an input in one go."""
    if hessian is None:
        return round_to_nearest(weight, site.weights)
    rounded = gptq(weight, hessian, site.weights, recipe.gptq.dampening_frac)
    return refine(weight, rounded, hessian, site.weights, recipe.gptq.refinements)


def _input_clip_ratio(
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
        return {"input_clip_ratio": torch.full((groups, 2), clip)}
    assert sample is not None  # such recipes need calibration
    return {"input_clip_ratio": search_clips(transform_input(sample, transform, tensors), args, groups)}


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
        "self_attn.attn.key_clip_ratio": torch.full(size, recipe.kv_cache.key_clip_ratio),
        "self_attn.attn.value_clip_ratio": torch.full(size, recipe.kv_cache.value_clip_ratio),
    }
    return tensors if keys is None else tensors | {"self_attn.attn.key_mean": keys}


def local_tensors(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    """A module's tensors out of those of its layer, by their names inside the module."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
