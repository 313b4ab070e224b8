"""A decoder layer that computes as its checkpoint tensors say, with gradients to what is trained of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infoquant_vllm.format import SITES, QuantizationConfigData
from offline.model.hidden_states import Rotary
from offline.training.fake_quant import (
    ATTENTION,
    ClampedClip,
    Clip,
    FakeQuantInput,
    FakeQuantKVCache,
    FakeQuantLinear,
    FixedClip,
    SigmoidClip,
)

CACHE = "self_attn.attn"

Layer = dict[str, torch.Tensor]
"""A decoder layer's checkpoint tensors by their names inside the layer."""


@dataclass(frozen=True)
class Trained:
    """What is trained of a layer: how its clip ratios are, and whether the rows of weights get a factor."""

    input_clip: Clip
    key_clip: Clip
    value_clip: Clip
    scales: bool


LEARNED_CLIPS = Trained(input_clip=SigmoidClip, key_clip=FixedClip, value_clip=SigmoidClip, scales=False)
"""For learned clips: the clip ratios of inputs and values."""
UNTRAINED = Trained(input_clip=FixedClip, key_clip=FixedClip, value_clip=FixedClip, scales=False)
"""For measurements of a layer as it was rounded."""
DISTILLED = Trained(input_clip=FixedClip, key_clip=ClampedClip, value_clip=ClampedClip, scales=True)
"""For distillation: a factor per row of weights, and the clip ratios of keys and values."""


class FakeQuantLayer(nn.Module):
    """A decoder layer of transformers, in float32, whose linears and KV cache are replaced by fake quantized ones.

    index: of the layer in the decoder
    layer: changed in place; may be without weights (device meta)
    tensors: of the layer, from `quantize_layer`
    """

    def __init__(self, index: int, layer: nn.Module, tensors: Layer, config: QuantizationConfigData, trained: Trained):
        super().__init__()
        self.layer = layer
        norms = {name: tensor.float() for name, tensor in tensors.items() if name.endswith("norm.weight")}
        layer.load_state_dict(norms, strict=False, assign=True)
        layer.requires_grad_(False)
        self._linears: dict[str, FakeQuantLinear] = {}
        for linears in SITES.values():
            scheme = config.scheme(f"model.layers.{index}.{linears[0]}")
            assert scheme is not None  # every linear of a decoder layer is quantized
            shared_input = FakeQuantInput(scheme, local_tensors(tensors, linears[0]), trained.input_clip)
            for linear in linears:
                local = local_tensors(tensors, linear)
                self._linears[linear] = FakeQuantLinear(shared_input, scheme, local, trained.scales)
                layer.set_submodule(linear, self._linears[linear])
        self._cache = None
        if config.kv_cache is not None:
            local = local_tensors(tensors, CACHE)
            self._cache = FakeQuantKVCache(config.kv_cache, local, trained.key_clip, trained.value_clip)
            attention: Any = layer.get_submodule("self_attn")
            attention.attn = self._cache
            attention.config._attn_implementation = ATTENTION

    def forward(self, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Map hidden [sequences, length, hidden] float32 through the layer; `rotary`: cosines and sines."""
        for linear in self._linears.values():
            linear.input.forget()
        return self.layer(hidden, position_embeddings=rotary)

    @torch.no_grad()
    def clips(self) -> Layer:
        """Return the trained clip ratios as the checkpoint stores them, each linear with a copy of its input's."""
        modules = {f"{name}.input_clip_ratio": linear.input.clip for name, linear in self._linears.items()}
        if self._cache is not None:
            modules[f"{CACHE}.key_clip_ratio"] = self._cache.key_clip
            modules[f"{CACHE}.value_clip_ratio"] = self._cache.value_clip
        trained = {name: clip for name, clip in modules.items() if isinstance(clip, SigmoidClip | ClampedClip)}
        return {name: clip().detach().cpu().clone() for name, clip in trained.items()}

    @torch.no_grad()
    def scales(self) -> Layer:
        """Return the weights' scales as the checkpoint stores them."""
        return {f"{name}.weight_scale": linear.scale() for name, linear in self._linears.items()}


def local_tensors(tensors: Layer, module: str) -> dict[str, torch.Tensor]:
    """Select a module's tensors from those of its layer, by their names inside the module."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
