"""The decoder layers of a run, one after another: activations, balance, rounding, clips."""

import time
from collections.abc import Iterator

import torch

from infoquant_vllm.format import ARCHITECTURES, SITES
from offline.algorithms.equalize import equalize_layer
from offline.algorithms.key_mean import mean_rotated_key
from offline.algorithms.rotations import Transforms
from offline.model.hidden_states import HiddenStates
from offline.model.input_statistics import InputStatistics
from offline.progress import held_bytes
from offline.run import Run
from offline.stages.fold import fold_layer
from offline.stages.learn_clips import learn_clips
from offline.stages.quantize_layer import quantize_layer
from offline.training.student import Layer

NEXT = "next-layer"
HIDDEN = "hidden"


def quantized_layers(run: Run, tokens: torch.Tensor | None, transforms: Transforms | None) -> Iterator[Layer]:
    """Every decoder layer's tensors by their names inside it, those that an earlier run had finished among them."""
    hidden, layers, done = None, run.source.shape.num_hidden_layers, 0
    if run.store.exists(NEXT):
        done = run.store.metadata(NEXT)["layer"]
    if run.recipe.rounding == "gptq" and done < layers:
        assert tokens is not None  # such recipes need calibration
        hidden = HiddenStates(run.source, tokens, transforms, run.devices, run.store.scratch)
        if done:
            hidden.restore(run.store.load(NEXT)[HIDDEN], done)
    for layer in range(done):
        _note(run, layer, run.store.metadata(_name(layer))["errors"], transforms)
        yield run.store.load(_name(layer))
    run.progress("layers", done, layers)  # the clock of the time left starts here
    for layer in range(done, layers):
        began = time.monotonic()
        tensors, errors = _quantized_layer(run, hidden, layer, transforms)
        pace = None if tokens is None else tokens.numel() / (time.monotonic() - began)
        if run.store.persistent:
            run.store.save(_name(layer), tensors, errors=errors)
            entering = {} if hidden is None or layer + 1 == layers else {HIDDEN: hidden.values}
            run.store.save(NEXT, entering, layer=layer + 1)
        yield tensors
        _note(run, layer, errors, transforms, pace)


def _name(layer: int) -> str:
    return f"layer-{layer:05d}"


def _note(
    run: Run, layer: int, errors: dict[str, float], transforms: Transforms | None, pace: float | None = None
) -> None:
    """Keep a layer's errors and tell of it; `pace`: calibration tokens per second, where it was computed now."""
    run.errors |= {f"model.layers.{layer}.{name}": error for name, error in errors.items()}
    mean = sum(errors.values()) / len(errors) if errors else None
    turned = None if transforms is None else transforms.orthogonality_error(layer)
    if turned is not None:
        run.orthogonality_errors[f"model.layers.{layer}"] = turned
    told = [] if mean is None else [f"output error {mean:.4f}"]
    told += [] if pace is None else [f"{pace:.0f} tokens/s"]
    run.progress(
        "layers", layer + 1, run.source.shape.num_hidden_layers, ", ".join([*told, f"{held_bytes() / 1e9:.1f} GB"])
    )
    if run.log is not None:
        run.log.write("layer", layer=layer, output_error=mean, orthogonality_error=turned, tokens_per_second=pace)


def _quantized_layer(
    run: Run, hidden: HiddenStates | None, layer: int, transforms: Transforms | None
) -> tuple[Layer, dict[str, float]]:
    shape, learned, before, keys, hessians = run.source.shape, run.recipe.learned_clips, None, None, None
    positions = None if run.recipe.kv_cache is None else run.recipe.kv_cache.key_mean_positions
    statistics = InputStatistics()
    state = {name: tensor.to(run.devices[0]) for name, tensor in fold_layer(run.source, layer, transforms).items()}
    if hidden is not None:
        with run.watch("activations"):
            if learned is not None:
                first = hidden.values[: learned.sequences]
                before = run.store.scratch.empty(*first.shape).copy_(first)
            _, key_module = ARCHITECTURES[shape.architecture].rope_inputs
            outputs = () if positions is None else (key_module,)
            hidden.forward_layer(state, [linears[0] for linears in SITES.values()], statistics.observe, outputs)
            hessians = statistics.take_hessians()
            if run.recipe.equalize:
                equalize_layer(state, hessians, statistics, shape)
            if positions is not None:
                mean = statistics.sums[key_module] / statistics.tokens[key_module]
                mean = mean.unflatten(0, (shape.num_key_value_heads, -1))
                keys = mean_rotated_key(mean, *hidden.rotary(positions))
    with run.watch("weights"):
        inputs = transforms.inputs[layer] if transforms is not None and transforms.inputs else {}
        dtype = run.source.unquantized_dtype
        tensors, errors = quantize_layer(state, hessians, statistics.samples(), inputs, keys, run.recipe, shape, dtype)
    if hidden is not None and learned is not None and before is not None:
        with run.watch("clips"):
            tensors |= learn_clips(tensors, hidden, before, learned, run.recipe, shape)
    return tensors, errors
