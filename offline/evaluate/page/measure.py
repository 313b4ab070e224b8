"""Measure the inputs of a checkpoint's quantizers on a text, and the same activations of its source."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infoquant_vllm.format import SITES, ActivationArgs, Checkpoint
from infoquant_vllm.kernels.torch.quantize import quantize_groups
from offline.algorithms.fake_quantize import fake_store, input_quant
from offline.algorithms.rotations import transform_input
from offline.errors import ToolError
from offline.evaluate.metrics import Figure, compare
from offline.evaluate.page.distribution import Distribution, Quantized, SiteFigures
from offline.evaluate.simulate import load_simulated
from offline.evaluate.simulated import SimulatedCache, SimulatedLinear
from offline.model.architectures import CausalLM
from offline.model.source import Source, config_dtype
from offline.progress import ProgressReport

CACHE_CLIPS = {"k": "key_clip_ratio", "v": "value_clip_ratio"}
"""Sites of the KV cache (keys after RoPE, and values) and their clip ratios."""

BySite = dict[str, list[SiteFigures]]
"""Figures of every layer by site."""


@dataclass(frozen=True)
class Measurement:
    """Figures after transforms, and before: the source's own activations through the same quantizers."""

    tokens: int
    windows: int
    after: BySite
    before: BySite | None
    figures: dict[str, Figure]
    """Perplexity and, with a source, its perplexity, KL and top-1 agreement (see `Evaluation`)."""


def measure(
    checkpoint: Checkpoint, source: Source | None, windows: list[torch.Tensor], progress: ProgressReport
) -> Measurement:
    """Run the simulated checkpoint and the source over windows of token ids [length].

    Raises ToolError where their sizes differ.
    """
    if source is not None and source.shape != checkpoint.shape:
        raise ToolError(
            f"{source.folder}: not the source of {checkpoint.folder}, sizes differ: "
            f"{source.shape} against {checkpoint.shape}"
        )
    model = load_simulated(checkpoint.folder)
    reference = None if source is None else source.model(config_dtype(source.hf_config))
    ours = _Observer(model, model)
    theirs = None if reference is None else _Observer(reference, model)
    figures = compare(windows, model, reference, progress)
    return Measurement(
        tokens=sum(map(len, windows)),
        windows=len(windows),
        after=ours.figures(),
        before=None if theirs is None else theirs.figures(),
        figures=figures,
    )


def clips(checkpoint: Checkpoint) -> dict[str, list[torch.Tensor]]:
    """Return by site and layer the clip ratios of (minimum, maximum) of its groups, [groups, 2] float32.

    Sites that are not quantized in every layer are left out.
    """
    tensors = {site: f"{linears[0]}.input_clip_ratio" for site, linears in SITES.items()}
    tensors |= {site: f"self_attn.attn.{name}" for site, name in CACHE_CLIPS.items()}
    found = {}
    for site, tensor in tensors.items():
        names = [f"model.layers.{layer}.{tensor}" for layer in range(checkpoint.shape.num_hidden_layers)]
        if all(name in checkpoint.weight_map for name in names):
            found[site] = [checkpoint.tensor(name) for name in names]
    return found


class _Observer:
    """Collect distributions by site and layer while `model` runs, quantized as `simulated` quantizes."""

    def __init__(self, model: CausalLM, simulated: CausalLM):
        self._layers, self._simulated = simulated.model.layers, model is simulated
        self._sites: dict[str, list[Distribution]] = {}
        for site, linears in SITES.items():
            self._sites[site] = [Distribution() for _ in self._layers]
            for index, layer in enumerate(model.model.layers):
                self._watch(layer.get_submodule(linears[0]), self._layers[index].get_submodule(linears[0]), site, index)
        if isinstance(getattr(self._layers[0].self_attn, "attn", None), SimulatedCache):
            self._sites |= {site: [Distribution() for _ in self._layers] for site in CACHE_CLIPS}
            model.register_forward_pre_hook(
                lambda _, args, kwargs: (args, kwargs | {"use_cache": True}), with_kwargs=True
            )
            model.register_forward_hook(lambda _, args, output: self._read_cache(output.past_key_values))

    def figures(self) -> BySite:
        """Return the figures of everything seen so far."""
        return {site: [layer.figures() for layer in layers] for site, layers in self._sites.items()}

    def _watch(self, module: nn.Module, simulated: nn.Module, site: str, layer: int) -> None:
        def count(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            if not isinstance(simulated, SimulatedLinear):
                self._sites[site][layer].add(x, None)
                return
            x, scheme = x.float(), simulated.scheme
            if self._simulated:
                tensors = dict(simulated.named_buffers())
                x = transform_input(x, scheme.input_transform, tensors)
                x = x - tensors.get("input_mean", 0)
            args = scheme.input_activations
            clip = None if args.num_bits == 16 else simulated.get_buffer("input_clip_ratio")
            self._sites[site][layer].add(*_quantized_input(x, args, clip))

        module.register_forward_pre_hook(count)

    def _read_cache(self, cache: Any) -> None:
        """Add the KV cache after a forward pass; that of a simulated model holds keys before RoPE."""
        for index, layer in enumerate(self._layers):
            attention, codes = layer.self_attn, layer.self_attn.attn
            keys, values = cache.layers[index].keys.float(), cache.layers[index].values.float()
            if self._simulated:
                keys = codes.prepare_keys(attention.rotary.apply_rope(cache.layers[index].keys, 0))
            feedback = codes.feedback, None
            for site, x, bits, shared in zip("kv", (keys, values), codes.num_bits, feedback, strict=True):
                clip = codes.get_buffer(CACHE_CLIPS[site])
                self._sites[site][index].add(*_quantized_entries(x, bits, clip, shared))


def _quantized_input(
    y: torch.Tensor, args: ActivationArgs, clip: torch.Tensor | None
) -> tuple[torch.Tensor, Quantized | None]:
    """Split values [tokens, K] into the groups that share a step, and quantize them."""
    if clip is None:
        return y, None
    quantized = quantize_groups(y, input_quant(args, clip, y.shape[1]))
    lowest = -quantized.zero * quantized.step
    highest = lowest + (2**args.num_bits - 1) * quantized.step
    values = quantized.dequantized()
    groups = y.unflatten(1, (len(clip), -1)).flatten(0, 1)
    return groups, Quantized(values.flatten(0, 1), lowest.flatten(), highest.flatten())


def _quantized_entries(
    x: torch.Tensor, num_bits: int, clip: torch.Tensor, feedback: torch.Tensor | None
) -> tuple[torch.Tensor, Quantized]:
    """Split keys or values [batch, kv_heads, tokens, head_size] by token and head, and quantize them."""
    values = fake_store(x, clip, num_bits, feedback)
    lowest, highest = x.amin(-1).clamp(max=0) * clip[:, :1], x.amax(-1).clamp(min=0) * clip[:, 1:]
    return x.flatten(0, 2), Quantized(values.flatten(0, 2), lowest.flatten(), highest.flatten())
