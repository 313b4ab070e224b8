"""One decoder layer's weights to codes, scales and clips."""

import torch

from infoquant_vllm.format import ModelShape, activation_groups, pack_codes
from offline.gptq import gptq, output_error
from offline.recipe import SITES, Recipe, Site
from offline.transforms import apply_hadamard
from offline.weights import QuantizedWeight, round_to_nearest


def quantize_layer(
    state: dict[str, torch.Tensor],
    hessians: dict[str, torch.Tensor] | None,
    recipe: Recipe,
    shape: ModelShape,
    dtype: torch.dtype,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The checkpoint's tensors of one layer, and the output error of each linear where GPTQ rounds.

    state: the layer as `fold_layer` gives it, float32; names are local to the layer, here and in the results
    hessians: of the inputs before the online rotation, by each site's first linear; None rounds to nearest
    dtype: of the norms and biases, which stay unquantised
    For distillation `weight_latent` [N, K] comes with each linear: what was rounded, in units of codes.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in state.items() if not name.endswith("_proj.weight")}
    errors: dict[str, float] = {}
    for name, linears in SITES.items():
        site: Site = getattr(recipe.sites, name)
        weights = [state[f"{linear}.weight"] for linear in linears]
        hessian = None if hessians is None else hessians[linears[0]]
        if name == "down" and recipe.transform != "none":
            weights, hessian = _rotate_online(weights, hessian)
        for linear, weight, rounded in zip(linears, weights, _round(weights, hessian, site, recipe), strict=True):
            tensors |= {f"{linear}.{key}": t for key, t in _linear_tensors(rounded, site, shape).items()}
            if recipe.distillation is not None:
                tensors[f"{linear}.weight_latent"] = rounded.latent
            if hessian is not None:
                errors[linear] = output_error(weight, rounded.values(), hessian)
    return tensors | _cache_clips(recipe, shape), errors


def _rotate_online(
    weights: list[torch.Tensor], hessian: torch.Tensor | None
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """W R and R^T H R for inputs x that become x R at run time, R = hadamard(size)."""
    if hessian is not None:
        hessian = apply_hadamard(apply_hadamard(hessian.double()).T).float()
    return [apply_hadamard(weight.double()).float() for weight in weights], hessian


def _round(
    weights: list[torch.Tensor], hessian: torch.Tensor | None, site: Site, recipe: Recipe
) -> list[QuantizedWeight]:
    """Quantise linears that share an input in one go."""
    stacked = torch.cat(weights)
    if hessian is None:
        rounded = round_to_nearest(stacked, site.weights)
    else:
        rounded = gptq(stacked, hessian, site.weights, recipe.gptq.damping)
    return rounded.split([len(weight) for weight in weights])


def _linear_tensors(weight: QuantizedWeight, site: Site, shape: ModelShape) -> dict[str, torch.Tensor]:
    args = site.weights
    tensors = {
        "weight_packed": pack_codes(weight.codes, args.num_bits, signed=args.symmetric),
        "weight_scale": weight.scale,
    }
    if not args.symmetric:
        tensors["weight_zero_point"] = weight.zero.to(torch.uint8)
    activations = site.input_activations.for_model(shape)
    if activations.num_bits != 16:
        groups = activation_groups(activations, weight.codes.shape[1])
        tensors["input_clip"] = torch.full((groups, 2), site.clip)
    return tensors


def _cache_clips(recipe: Recipe, shape: ModelShape) -> dict[str, torch.Tensor]:
    if recipe.kv_cache is None:
        return {}
    size = (shape.num_key_value_heads, 2)
    return {
        "self_attn.attn.key_clip": torch.full(size, recipe.kv_cache.key_clip),
        "self_attn.attn.value_clip": torch.full(size, recipe.kv_cache.value_clip),
    }
