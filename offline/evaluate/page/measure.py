"""What a checkpoint's quantizers see while it reads a text, and what its source has in the same places."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from infoquant_vllm.format import SITES, ActivationArgs, Checkpoint
from infoquant_vllm.kernels.torch.quantize import quantize_groups
from offline.algorithms.fake_quantize import fake_store
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
"""Sites of the KV cache: keys after RoPE, and values."""

BySite = dict[str, list[SiteFigures]]
"""By site the figures of every layer."""


@dataclass(frozen=True)
class Measurement:
    """What `measure` found. Before: the source's own values, through the same quantizers."""

    tokens: int
    windows: int
    after: BySite
    before: BySite | None
    figures: dict[str, Figure]
    """See `Evaluation`: the perplexity, and with a source its perplexity, KL and agreement."""


def measure(
    checkpoint: Checkpoint, source: Source | None, windows: list[torch.Tensor], progress: ProgressReport
) -> Measurement:
    """Run the simulated checkpoint, and the source, over windows of token ids [length].

    Raises ToolError where the source has other sizes than the checkpoint.
    """
    if source is not None and source.shape != checkpoint.shape:
        raise ToolError(
            f"{source.folder}: not what {checkpoint.folder} was made from, sizes differ: "
            f"{source.shape} against {checkpoint.shape}"
        )
    model = load_simulated(checkpoint.folder, config_dtype(checkpoint.hf_config))
    reference = None if source is None else source.model(config_dtype(source.hf_config))
    ours = _Observed(model, model, _as_quantized)
    theirs = None if reference is None else _Observed(reference, model, _as_it_is)
    figures = compare(windows, model, reference, progress)
    return Measurement(
        tokens=sum(map(len, windows)),
        windows=len(windows),
        after=ours.figures(),
        before=None if theirs is None else theirs.figures(),
        figures=figures,
    )


def clips(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """By site the factors on (minimum, maximum) of every layer's groups, [layers, groups, 2] float32.

    Sites that are quantized in some layers only are left out, as are those that are not at all.
    """
    ends = {site: f"{linears[0]}.input_clip_ratio" for site, linears in SITES.items()}
    ends |= {site: f"self_attn.attn.{name}" for site, name in CACHE_CLIPS.items()}
    found = {}
    for site, end in ends.items():
        names = [f"model.layers.{layer}.{end}" for layer in range(checkpoint.shape.num_hidden_layers)]
        if all(name in checkpoint.weight_map for name in names):
            found[site] = torch.stack([checkpoint.tensor(name) for name in names])
    return found


View = Callable[[torch.Tensor, SimulatedLinear], torch.Tensor]
"""From a linear's input [tokens, K] to the values that are to be quantized."""


def _as_it_is(x: torch.Tensor, linear: SimulatedLinear) -> torch.Tensor:
    return x.float()


def _as_quantized(x: torch.Tensor, linear: SimulatedLinear) -> torch.Tensor:
    return transform_input(x.float(), linear.scheme.input_transform, dict(linear.named_buffers()))


class _Observed:
    """Distributions by site and layer that fill as `model` runs, quantized as `simulated` would."""

    def __init__(self, model: CausalLM, simulated: CausalLM, view: View):
        self._layers, self._view = simulated.model.layers, view
        self._exact = model is not simulated
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
        """Of everything seen so far."""
        return {site: [layer.figures() for layer in layers] for site, layers in self._sites.items()}

    def _watch(self, module: nn.Module, simulated: nn.Module, site: str, layer: int) -> None:
        def count(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            if not isinstance(simulated, SimulatedLinear):
                self._sites[site][layer].add(x, None)
                return
            scheme = simulated.scheme.input_activations
            clip = None if scheme.num_bits == 16 else simulated.get_buffer("input_clip_ratio")
            self._sites[site][layer].add(*_quantized_input(self._view(x, simulated), scheme, clip))

        module.register_forward_pre_hook(count)

    def _read_cache(self, cache: Any) -> None:
        """Count what transformers' cache holds after a pass; simulated models keep keys without their RoPE there."""
        for index, layer in enumerate(self._layers):
            attention, codes = layer.self_attn, layer.self_attn.attn
            keys, values = cache.layers[index].keys.float(), cache.layers[index].values.float()
            if not self._exact:
                keys = codes.prepare_keys(attention.rotary.apply_rope(cache.layers[index].keys, 0))
            for site, x, bits in zip("kv", (keys, values), codes.num_bits, strict=True):
                self._sites[site][index].add(*_quantized_cells(x, bits, codes.get_buffer(CACHE_CLIPS[site])))


def _quantized_input(
    y: torch.Tensor, args: ActivationArgs, clip: torch.Tensor | None
) -> tuple[torch.Tensor, Quantized | None]:
    """Values [tokens, K] as the groups that share a scale, and their quantized values."""
    if clip is None:
        return y, None
    codes, scale, zero = quantize_groups(y, clip, args.num_bits, args.symmetric)
    lowest = -zero * scale
    highest = lowest + (2**args.num_bits - 1) * scale
    values = (codes - zero) * scale
    groups = y.unflatten(1, (len(clip), -1)).flatten(0, 1)
    return groups, Quantized(values.flatten(0, 1), lowest.flatten(), highest.flatten())


def _quantized_cells(x: torch.Tensor, num_bits: int, clip: torch.Tensor) -> tuple[torch.Tensor, Quantized]:
    """Keys or values [batch, kv_heads, tokens, head_size] as groups [cells, head_size], and what the cache returns."""
    values = fake_store(x, clip, num_bits)
    lowest, highest = x.amin(-1).clamp(max=0) * clip[:, :1], x.amax(-1).clamp(min=0) * clip[:, 1:]
    return x.flatten(0, 2), Quantized(values.flatten(0, 2), lowest.flatten(), highest.flatten())
