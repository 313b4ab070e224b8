"""Measure what each number format costs, in KL to the source, for the choice under a budget.

One site of one layer is quantized at a time, in the rotated and equalized model: its weights alone, or its inputs
alone, as the base recipe rounds them. What leaves that layer goes through the later layers of the source, so that a
measurement runs only those. KL is of second order in a small error of a site's outputs, so other formats of the same
site are scaled by the squared errors of its outputs: two roundings of a site differ by chance as much as their formats
do, and a measurement of each would take that for a difference.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from infoquant_vllm.format import SITES, KVCacheArgs
from offline.algorithms.rotations import Transforms
from offline.choices import SiteChoices
from offline.formats import SiteName
from offline.memory import KL_POSITIONS
from offline.model.hidden_states import HiddenStates, Rotary
from offline.model.input_statistics import InputStatistics
from offline.run import Run
from offline.stages.fold import fold_layer
from offline.stages.quantize_layer import LayerInputs, quantize_layer
from offline.stages.quantize_layers import collect_statistics
from offline.stages.site_kl import LaterLayers, LayerKL, LayerSite
from offline.stages.weigh_tokens import weigh_tokens
from offline.training.fake_quant import ATTENTION, FakeQuantKVCache, FixedClip
from offline.training.fake_quant_layer import CACHE, UNTRAINED, FakeQuantLayer, local_tensors

KEPT = "sensitivity"
SEQUENCES = 4
LENGTH = KL_POSITIONS // SEQUENCES
"""Tokens on which KL is measured: the first ones of the calibration text's first sequences."""
CALIBRATED = 16
"""Sequences of which roundings read the statistics."""
CACHE_BITS = ((4, 4), (8, 4), (4, 8), (8, 8))

Tensors = dict[str, torch.Tensor]


class Sensitivity(BaseModel):
    """KL to the source in nats per token, by what alone is quantized.

    weights, inputs: by site, layer and format (see `SiteChoices`)
    caches: of all layers together, by bits of keys and values: "4,8"
    lm_head: in 8 bits; 0 where the base has it so
    linears: all weights and inputs together in the base's formats
    """

    model_config = ConfigDict(frozen=True)

    weights: dict[str, list[list[float]]]
    inputs: dict[str, list[list[float]]]
    caches: dict[str, float]
    lm_head: float
    linears: float


def measure_sensitivity(
    run: Run, tokens: torch.Tensor, transforms: Transforms | None, choices: Mapping[SiteName, SiteChoices]
) -> Sensitivity:
    """Measure the formats of `choices` on calibration tokens [sequences, length]; holds the whole model."""
    if run.store.exists(KEPT):
        return Sensitivity.model_validate(run.store.metadata(KEPT)["found"])
    weights = weigh_tokens(run, tokens) if run.recipe.gptq.guided else {}
    with run.watch(KEPT), torch.no_grad():
        found = _Measurement(run, tokens, transforms, choices).run(weights)
    if run.store.persistent:
        run.store.save(KEPT, {}, found=found.model_dump(mode="json"))
    return found


class _Measurement:
    """The state of a measurement, which takes the layers in turn."""

    def __init__(
        self, run: Run, tokens: torch.Tensor, transforms: Transforms | None, choices: Mapping[SiteName, SiteChoices]
    ):
        self._run, self._transforms, self._choices = run, transforms, choices
        self._hidden = HiddenStates(run.source, tokens[:CALIBRATED], transforms, run.devices, run.store.scratch)
        self._later = LaterLayers(run, tokens[:SEQUENCES, :LENGTH], transforms)
        self._linears = self._entering()
        pairs = () if run.config.kv_cache is None else CACHE_BITS
        self._caches = {f"{keys},{values}": self._linears for keys, values in pairs}

    def run(self, token_weights: Tensors) -> Sensitivity:
        """Return the KL of all formats; `token_weights`: of the calibration tokens, by module."""
        layers = self._run.source.shape.num_hidden_layers
        weights: dict[str, list[list[float]]] = {site: [] for site in SITES}
        inputs: dict[str, list[list[float]]] = {site: [] for site in SITES}
        head = 0.0 if self._run.recipe.lm_head_bits is not None else self._later.lm_head_kl()
        tokens = self._hidden.values[..., 0].numel()
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            names = [name for name in token_weights if name.startswith(prefix)]
            own = {name.removeprefix(prefix): token_weights[name][:tokens] for name in names}
            for site, (of_weights, of_inputs) in self._layer(layer, own).items():
                weights[site].append(of_weights)
                inputs[site].append(of_inputs)
            total = sum(kls[-1][0] for part in (weights, inputs) for kls in part.values())
            self._run.progress(KEPT, layer + 1, layers, f"KL {total:.4f}")
        return Sensitivity(
            weights=weights,
            inputs=inputs,
            caches={bits: self._later.kl(hidden) for bits, hidden in self._caches.items()},
            lm_head=head,
            linears=self._later.kl(self._linears),
        )

    def _entering(self) -> torch.Tensor:
        return self._hidden.values[:SEQUENCES, :LENGTH].to(self._run.devices[0], copy=True)

    def _layer(self, layer: int, token_weights: Tensors) -> dict[str, tuple[list[float], list[float]]]:
        """Return the KL of the formats of weights and of inputs by site; all hidden states run through the layer."""
        run, device, entering = self._run, self._run.devices[0], self._entering()
        folded = fold_layer(run.source, layer, self._transforms)
        inputs = LayerInputs(layer, {name: tensor.to(device) for name, tensor in folded.items()})
        collect_statistics(run, self._hidden, inputs, InputStatistics(token_weights))
        module, _ = self._hidden.copy_layer()
        module.load_state_dict(inputs.state, assign=True)
        rotary = self._hidden.rotary(entering.shape[1])
        sites = [
            LayerSite(site, inputs, own, run.config.scheme(f"model.layers.{layer}.{SITES[site][0]}"))
            for site, own in self._choices.items()
        ]
        tensors, _ = quantize_layer(inputs, run.recipe, run.source.shape, torch.float32)
        self._later.skip(layer)
        self._through_quantized(layer, module, tensors, rotary)
        layer_kl = LayerKL(module, rotary, entering, self._later)
        return {site.name: site.measure(tensors, layer_kl) for site in sites}

    def _through_quantized(self, layer: int, module: nn.Module, tensors: Tensors, rotary: Rotary) -> None:
        """Run the hidden states of the model whose linears are quantized, and of those whose caches are."""
        config = self._run.config.model_copy(update={"kv_cache": None})
        quantized = FakeQuantLayer(layer, copy.deepcopy(module), tensors, config, UNTRAINED)
        self._linears = quantized.to(self._linears.device)(self._linears, rotary)
        for bits, hidden in self._caches.items():
            assert self._run.config.kv_cache is not None
            key_bits, value_bits = map(int, bits.split(","))
            args = self._run.config.kv_cache.model_copy(update={"key_bits": key_bits, "value_bits": value_bits})
            cached = _with_cache(copy.deepcopy(module), args, tensors).to(hidden.device)
            self._caches[bits] = cached(hidden, position_embeddings=rotary)


def _with_cache(module: nn.Module, args: KVCacheArgs, tensors: Tensors) -> nn.Module:
    """Give a decoder layer a quantized KV cache."""
    attention: Any = module.get_submodule("self_attn")
    attention.attn = FakeQuantKVCache(args, local_tensors(tensors, CACHE), FixedClip, FixedClip)
    attention.config._attn_implementation = ATTENTION
    return module
