"""A decoder layer as a checkpoint's tensors make it, with gradients to its clip factors."""

import math
from typing import Any

import torch
from torch import nn

from infoquant_vllm.format import (
    SITE_NORMS,
    SITES,
    ActivationArgs,
    InputTransform,
    ModelShape,
    WeightArgs,
    activation_groups,
)
from offline.algorithms.fake_quantize import dequantized_weight, fake_quantize
from offline.algorithms.rotations import InputTensors, hadamard_product, transform_input
from offline.recipe import KVCache, Recipe
from offline.stages.quantize_layer import local_tensors
from offline.training.fake_quant_cache import ATTENTION, TrainedCache, register_attention

START = math.log(9)


class ClippedLayer(nn.Module):
    """A layer in float32 whose weights are what their codes stand for and whose rounding passes gradients.

    layer: a decoder layer of transformers without weights, which is changed
    tensors: the layer's, from `quantize_layer`; their clip factors are not read but start afresh
    """

    def __init__(self, layer: nn.Module, tensors: dict[str, torch.Tensor], recipe: Recipe, shape: ModelShape):
        super().__init__()
        layer.load_state_dict(_state(tensors, recipe), assign=True)
        self._layer = layer.requires_grad_(False)
        self._inputs: dict[str, ClippedInput] = {}
        self._cache: ClippedCache | None = None
        for name, linears in SITES.items():
            _, features = shape.linears()[f"model.layers.0.{linears[0]}"]
            args, transform = recipe.input_activations(name, shape), recipe.input_transform(name, shape)
            self._inputs[name] = ClippedInput(transform, local_tensors(tensors, linears[0]), args, features)
            place = SITE_NORMS.get(name, linears[0])
            found = layer.get_submodule(place)
            order = (found, self._inputs[name]) if name in SITE_NORMS else (self._inputs[name], found)
            layer.set_submodule(place, nn.Sequential(*order))
        if recipe.kv_cache is not None:
            key_mean = tensors.get("self_attn.attn.key_mean")
            heads = shape.num_key_value_heads
            self._cache = ClippedCache(recipe.kv_cache, recipe.transform != "none", key_mean, heads)
            attention: Any = layer.get_submodule("self_attn")
            attention.attn = self._cache
            register_attention()
            attention.config._attn_implementation = ATTENTION

    def forward(self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """hidden [sequences, length, hidden] float32 behind the layer; `rotary`: cosines and sines."""
        return self._layer(hidden, position_embeddings=rotary)

    def clips(self) -> dict[str, torch.Tensor]:
        """The clip factors as the checkpoint's tensors, by their names inside the layer."""
        clips: dict[str, torch.Tensor] = {}
        for name, linears in SITES.items():
            clip = self._inputs[name].clip
            if clip is not None:
                clips |= {f"{linear}.input_clip_ratio": clip().detach().cpu() for linear in linears}
        if self._cache is not None:
            clips["self_attn.attn.value_clip_ratio"] = self._cache.clip().detach().cpu()
        return clips


class Clip(nn.Module):
    """Clip factors [groups, 2] on (minimum, maximum): (1 + sigmoid(logits)) / 2, 0.95 at first."""

    def __init__(self, groups: int):
        super().__init__()
        self.logits = nn.Parameter(torch.full((groups, 2), START))

    def forward(self) -> torch.Tensor:
        """The factors."""
        return (1 + self.logits.sigmoid()) / 2


class ClippedInput(nn.Module):
    """A site's input transform and activation quantizer; without clip factors where inputs keep 16 bits."""

    def __init__(self, transform: InputTransform, tensors: InputTensors, args: ActivationArgs, features: int):
        super().__init__()
        self._transform, self._tensors, self._args = transform, tensors, args
        self.clip = None if args.num_bits == 16 else Clip(activation_groups(args, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] float32, transformed and quantized."""
        y = transform_input(x.flatten(0, -2), self._transform, self._tensors, hadamard_product).view(x.shape)
        return y if self.clip is None else fake_quantize(y, self.clip(), self._args.num_bits, self._args.symmetric)


class ClippedCache(TrainedCache):
    """A layer's KV cache; the clip of the keys stays the recipe's."""

    def __init__(self, args: KVCache, rotate_keys: bool, key_mean: torch.Tensor | None, heads: int):
        super().__init__((args.key_bits, args.value_bits), rotate_keys, key_mean)
        self.register_buffer("_key_clip_ratio", torch.full((heads, 2), args.key_clip_ratio))
        self.clip = Clip(heads)

    def clips(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip factors [kv_heads, 2] of keys and of values."""
        return self.get_buffer("_key_clip_ratio"), self.clip()


def _state(tensors: dict[str, torch.Tensor], recipe: Recipe) -> dict[str, torch.Tensor]:
    """The layer's parameters: norms and biases, and the weights that the codes stand for."""
    state = {name: tensor.float() for name, tensor in tensors.items() if name.endswith(("norm.weight", ".bias"))}
    for name, linears in SITES.items():
        args: WeightArgs = getattr(recipe.sites, name).weights
        for linear in linears:
            state[f"{linear}.weight"] = dequantized_weight(local_tensors(tensors, linear), args)
    return state
