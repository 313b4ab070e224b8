"""Run and quantize the experts of a layer's mixture, one in memory at a time."""

import torch

from offline.algorithms.clip_search import search_clips
from offline.algorithms.rotations import Transforms, transform_input
from offline.errors import ToolError
from offline.model.hidden_states import HiddenStates
from offline.model.input_statistics import SAMPLE_STRIDE, InputStatistics
from offline.run import Run
from offline.stages.equalize import equalize_mlp
from offline.stages.fold import fold_expert
from offline.stages.quantize_layer import LayerInputs, quantize_sites

Tensors = dict[str, torch.Tensor]
Counts = list[tuple[int, int]]
"""By expert: the tokens that the router sent to it, and those that were dealt to it."""


def run_experts(run: Run, hidden: HiddenStates, layer: int, transforms: Transforms | None) -> None:
    """Add the outputs of a layer's experts to hidden states that `forward_layer` has run through the layer.

    Does nothing in a layer without a mixture.
    """
    for expert in range(run.source.shape.num_experts):
        hidden.forward_expert(expert, _weights(run, layer, expert, transforms), lambda *_: None)


def quantized_experts(
    run: Run, hidden: HiddenStates | None, layer: int, transforms: Transforms | None
) -> tuple[Tensors, dict[str, float], Counts]:
    """Return tensors, output errors and counts of tokens of a layer's experts; runs `hidden` as `run_experts` does.

    They read one input, whose clip ratios are searched once, on the tokens of all.
    """
    shape, recipe = run.source.shape, run.recipe
    found: Tensors = {}
    errors: dict[str, float] = {}
    counts: Counts = []
    sample = None if hidden is None or hidden.routed is None else hidden.routed.inputs[::SAMPLE_STRIDE]
    clips = None
    for expert in range(shape.num_experts):
        assert shape.experts is not None
        place = shape.experts.expert(expert)
        inputs = LayerInputs(layer, _weights(run, layer, expert, transforms))
        if hidden is not None:
            counts.append(_observe(run, hidden, expert, inputs))
            _check_unseen(run, layer, counts)
        if clips is None and sample is not None and recipe.site("gate_up", layer).clip_ratio == "search":
            site = f"{place}.gate_up"
            y = transform_input(sample.to(run.devices[0]), recipe.input_transform(site, shape), {})
            clips = search_clips(y, recipe.input_activations(site, shape, layer))
        inputs.clips = {} if clips is None else {f"{place}.gate_up": clips}
        sites = [f"{place}.gate_up", f"{place}.down"]
        with run.watch("weights"):
            tensors, lost = quantize_sites(inputs, sites, recipe, shape)
        found |= {name: tensor.cpu() for name, tensor in tensors.items()}
        errors |= lost
    return found, errors, counts


def _weights(run: Run, layer: int, expert: int, transforms: Transforms | None) -> Tensors:
    folded = fold_expert(run.source, layer, expert, transforms)
    return {name: tensor.to(run.devices[0]) for name, tensor in folded.items()}


def _observe(run: Run, hidden: HiddenStates, expert: int, inputs: LayerInputs) -> tuple[int, int]:
    """Run an expert; fills in Hessians and samples, equalizes the weights. Returns the tokens routed and dealt."""
    shape, args = run.source.shape, run.recipe.experts
    each = hidden.values[..., 0].numel() * shape.num_experts_per_tok / shape.num_experts
    statistics = InputStatistics(stride=max(1, SAMPLE_STRIDE * shape.num_experts_per_tok // shape.num_experts))
    with run.watch("activations"):
        count = hidden.forward_expert(expert, inputs.state, statistics.observe, max(1, int(args.least_share * each)))
    inputs.hessians = statistics.take_hessians()
    if run.recipe.equalize:
        assert shape.experts is not None
        place = shape.experts.expert(expert)
        up, down = f"{place}.{shape.experts.up}", f"{place}.{shape.experts.down}"
        equalize_mlp(inputs.state, inputs.hessians, statistics, up, down)
    inputs.samples = statistics.samples()
    return count


def _check_unseen(run: Run, layer: int, counts: Counts) -> None:
    """Refuse experts that no token of the calibration text reaches, more of them than the recipe lets through."""
    unseen = sum(routed == 0 for layers in (*run.expert_tokens.values(), counts) for routed, _ in layers)
    allowed = run.recipe.experts.unseen
    if unseen > allowed:
        raise ToolError(
            f"model.layers.{layer}: the router sends none of the calibration text to expert {len(counts) - 1}, the "
            f"{unseen}. such expert so far and {allowed} are allowed; use more or other text, or set `unseen` of "
            f"`experts` in the recipe: they are calibrated then on tokens that the router sends to other experts"
        )
