"""Quantize the decoder layers of a run, one after another: activations, equalization, rounding, clip ratios."""

import time
from collections.abc import Iterator

import torch

from infoquant_vllm.format import ARCHITECTURES
from offline.algorithms.rotations import Transforms
from offline.model.hidden_states import OUTPUT, HiddenStates
from offline.model.input_statistics import InputStatistics
from offline.progress import held_bytes
from offline.run import Run
from offline.stages.calibrate_keys import QueryMoments, calibrate_keys
from offline.stages.equalize import equalize_layer
from offline.stages.experts import Counts, quantized_experts
from offline.stages.fold import fold_layer
from offline.stages.learn_clips import learn_clips
from offline.stages.quantize_layer import LayerInputs, quantize_layer
from offline.stages.weigh_tokens import weigh_tokens
from offline.training.fake_quant_layer import Layer

RESUME_STATE, HIDDEN = "next-layer", "hidden"
SCALES = "adapter_basis."
"""Begins the names of scales for the basis of adapters, which come with a layer's tensors."""


def quantized_layers(run: Run, tokens: torch.Tensor | None, transforms: Transforms | None) -> Iterator[Layer]:
    """Yield every decoder layer's tensors by their names inside it; layers that an earlier run finished are read.

    Those whose names begin with SCALES belong to the basis of adapters, not to the layer.
    """
    hidden, layers, done = None, run.source.shape.num_hidden_layers, 0
    if run.store.exists(RESUME_STATE):
        done = run.store.metadata(RESUME_STATE)["layer"]
    weights: dict[str, torch.Tensor] = {}
    if run.recipe.reads_layers and done < layers:
        assert tokens is not None  # such recipes need calibration
        weights = weigh_tokens(run, tokens) if run.recipe.gptq.guided else {}
        hidden = HiddenStates(run.source, tokens, transforms, run.devices, run.store.scratch)
        if done:
            hidden.restore(run.store.load(RESUME_STATE)[HIDDEN], done)
    for layer in range(done):
        known = run.store.metadata(_name(layer))
        _keep_counts(run, layer, [(routed, dealt) for routed, dealt in known["expert_tokens"]])
        _log_layer(run, layer, known["errors"], transforms)
        yield run.store.load(_name(layer))
    run.progress("layers", done, layers)  # the clock of the time left starts here
    for layer in range(done, layers):
        began = time.monotonic()
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        tensors, errors, counts = _quantized_layer(run, hidden, layer, transforms, own)
        _keep_counts(run, layer, counts)
        pace = None if tokens is None else tokens.numel() / (time.monotonic() - began)
        if run.store.persistent:
            run.store.save(_name(layer), tensors, errors=errors, expert_tokens=counts)
            entering = {} if hidden is None or layer + 1 == layers else {HIDDEN: hidden.values}
            run.store.save(RESUME_STATE, entering, layer=layer + 1)
        yield tensors
        _log_layer(run, layer, errors, transforms, pace)


def _name(layer: int) -> str:
    return f"layer-{layer:05d}"


def _keep_counts(run: Run, layer: int, counts: Counts) -> None:
    if counts:
        run.expert_tokens[f"model.layers.{layer}"] = counts


def _log_layer(
    run: Run, layer: int, errors: dict[str, float], transforms: Transforms | None, pace: float | None = None
) -> None:
    """Report a layer's errors; `pace`: calibration tokens per second, None for a layer of an earlier run."""
    run.errors |= {f"model.layers.{layer}.{name}": error for name, error in errors.items()}
    mean = sum(errors.values()) / len(errors) if errors else None
    orthogonality = None if transforms is None else transforms.orthogonality_error(layer)
    if orthogonality is not None:
        run.orthogonality_errors[f"model.layers.{layer}"] = orthogonality
    details = [] if mean is None else [f"output error {mean:.4f}"]
    details += [] if pace is None else [f"{pace:.0f} tokens/s"]
    details += [f"{held_bytes() / 1e9:.1f} GB"]
    run.progress("layers", layer + 1, run.source.shape.num_hidden_layers, ", ".join(details))
    if run.log is not None:
        run.log.write(
            "layer", layer=layer, output_error=mean, orthogonality_error=orthogonality, tokens_per_second=pace
        )


def _quantized_layer(
    run: Run, hidden: HiddenStates | None, layer: int, transforms: Transforms | None, weights: dict[str, torch.Tensor]
) -> tuple[Layer, dict[str, float], Counts]:
    """Return a layer's tensors, output errors and, of experts, counts of tokens; runs `hidden` through the layer.

    weights: of the tokens, by module (see `InputStatistics`)
    """
    learned, before = run.recipe.learned_clips, None
    folded = fold_layer(run.source, layer, transforms)
    inputs = LayerInputs(layer, _on(run.devices[0], folded))
    del folded
    if transforms is not None and transforms.inputs:
        inputs.transforms = {site: _on(run.devices[0], own) for site, own in transforms.inputs[layer].items()}
    if hidden is not None:
        with run.watch("activations"):
            if learned is not None:
                first = hidden.values[: learned.sequences]
                before = run.store.scratch.empty(*first.shape).copy_(first)
            sink_stride = hidden.values.shape[1] if run.recipe.gptq.sink_weight else None
            collect_statistics(run, hidden, inputs, InputStatistics(weights, sink_stride=sink_stride))
    with run.watch("weights"):
        tensors, errors = quantize_layer(inputs, run.recipe, run.source.shape, run.source.unquantized_dtype)
    found, lost, counts = quantized_experts(run, hidden, layer, transforms)
    tensors, errors = tensors | found, errors | lost
    if hidden is not None and learned is not None and before is not None:
        with run.watch("clips"):
            tensors |= learn_clips(layer, tensors, hidden, before, learned, run.config)
    tensors |= {f"{SCALES}{name}": scale.cpu() for name, scale in inputs.folded_scales.items()}
    return tensors, errors, counts


def _on(device: torch.device, tensors: Layer) -> Layer:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def collect_statistics(run: Run, hidden: HiddenStates, inputs: LayerInputs, statistics: InputStatistics) -> None:
    """Run `hidden` through the layer of `inputs`; fills in Hessians, samples and the cache's, equalizes the weights."""
    shape, args = run.source.shape, run.recipe.kv_cache
    queries, (query_module, key_module) = QueryMoments(shape), ARCHITECTURES[shape.architecture].rope_inputs

    def observe(module: str, x: torch.Tensor) -> None:
        if module == query_module + OUTPUT:
            queries.observe(x)
        else:
            statistics.observe(module, x)

    found = [linears[0] for linears in shape.sites.values() if f"{linears[0]}.weight" in inputs.state]
    modules = [] if run.recipe.rounding == "none" else found
    outputs: tuple[str, ...] = (key_module,) if run.recipe.reads_keys else ()
    outputs += (query_module,) if args is not None and args.key_feedback else ()
    hidden.forward_layer(inputs.state, modules, observe, outputs)
    inputs.hessians = statistics.take_hessians()
    if run.recipe.equalize:
        scales = equalize_layer(inputs.state, inputs.hessians, statistics, shape)
        queries.scale(1 / scales.keys)
        inputs.folded_scales = scales.folded
    if args is not None and run.recipe.reads_keys:
        mean = statistics.sums[key_module + OUTPUT] / statistics.tokens[key_module + OUTPUT]
        mean = mean.unflatten(0, (shape.num_key_value_heads, -1))
        transformed = run.recipe.transform != "none"
        key_mean, inputs.key_feedback = calibrate_keys(args, hidden, mean, queries, transformed)
        inputs.key_mean = key_mean if shape.attn_logit_softcapping is None else None
    for site in run.recipe.centered_sites(shape, inputs.index):
        linear = shape.sites[site][0]
        inputs.means[linear] = statistics.subtract_mean(linear, inputs.hessians[linear])
    inputs.samples, inputs.sinks = statistics.samples(), statistics.sinks()
