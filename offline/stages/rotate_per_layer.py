"""Learn rotations for every layer and input by PSOT (see `algorithms/psot.py`).

They act on the inputs of linears at run time, so the residual stream stays in the source's basis; only
the rotations of the values, R2, fold into the weights.
"""

from collections.abc import Sequence
from typing import Any

import torch

from infoquant_vllm.format import ModelShape
from offline.algorithms.outlier_tokens import outlier_weights
from offline.algorithms.psot import Loss, head_loss, input_loss, learn_rotations
from offline.algorithms.rotations import InputTensors, Transforms, random_hadamard, random_head_rotations
from offline.model.hidden_states import HiddenStates
from offline.output.store import Store
from offline.run import Run
from offline.stages.fold import fold_layer

NEXT = "next-rotations"
"""Name of the state from which the next layer's rotations are learned."""
LAYERS_WITHOUT_OUTLIERS = 2
"""Number of first layers in which all tokens have the same weight."""
OBSERVED = {"self_attn.q_proj": "qkv", "self_attn.o_proj": "o", "mlp.gate_proj": "gate_up"}


def learn_layer_rotations(run: Run, tokens: torch.Tensor, generator: torch.Generator) -> Transforms:
    """Return rotations for the attention input, the MLP input and the values of every layer.

    Four activations of one layer, each up to as large as the calibration text's hidden states, are held
    at a time, on disk where memory is short. The rotations of the inputs are saved in `run.store`.
    """
    layers, store = run.source.shape.num_hidden_layers, run.store
    heads = random_head_rotations(run.source.shape, generator)
    hidden, done = HiddenStates(run.source, tokens, None, run.devices, store.scratch), 0
    if store.exists(NEXT):
        saved, done = store.load(NEXT), store.metadata(NEXT)["layer"]
        hidden.restore(saved["hidden"], done)
        heads.copy_(saved["heads"])
        generator.set_state(saved["generator"])
    for layer in range(done, layers):
        rotations, heads[layer], losses = _learn_layer(run, hidden, layer, heads[layer], generator)
        store.save(_name(layer), {site: rotation.float() for site, rotation in rotations.items()})
        if store.persistent:
            state = {"hidden": hidden.values, "heads": heads, "generator": generator.get_state()}
            store.save(NEXT, state, layer=layer + 1)
        falls = ", ".join(f"{loss:.3f}" for loss in losses)
        run.progress("rotations", layer + 1, layers, f"losses at {falls} of the first epoch")
    return Transforms(None, heads, _SavedInputs(store, layers))


def _learn_layer(
    run: Run, hidden: HiddenStates, layer: int, heads: torch.Tensor, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[float]]:
    """Return rotations by site, those of the values, learned from `heads`, and what is left of each loss."""
    args, shape = run.recipe.psot_layer, run.source.shape
    seen = _activations(run, hidden, layer)
    outlier_weight = 1.0 if layer < LAYERS_WITHOUT_OUTLIERS else args.outlier_weight
    weights = {name: outlier_weights(x.flatten(2), outlier_weight) for name, x in seen.items()}
    sequences = range(0, len(hidden.values), args.batch_sequences)
    batches = [slice(first, first + args.batch_sequences) for first in sequences]
    rates = torch.linspace(args.learning_rate, args.last_learning_rate, args.epochs).tolist()

    def learn(start: torch.Tensor, loss: Loss) -> torch.Tensor:
        rotation, left = learn_rotations(start, loss, batches, rates, generator, run.devices[0])
        losses.append(left)
        return rotation

    rotations, losses = {}, list[float]()
    for site in ("qkv", "gate_up"):
        x = seen[site].unflatten(2, (args.blocks, 1, -1))
        start = torch.stack([random_hadamard(x.shape[-1], generator) for _ in range(args.blocks)])
        rotations[site] = learn(start, input_loss(x, weights[site], args.temperature))
    outputs = seen["o"].unflatten(2, (shape.num_key_value_heads, -1, shape.head_dim))
    values = seen["v"].unflatten(2, (shape.num_key_value_heads, 1, shape.head_dim))
    loss = head_loss((outputs, weights["o"]), (values, weights["v"]), args.temperature)
    return rotations, learn(heads, loss), losses


class _SavedInputs(Sequence[dict[str, InputTensors]]):
    """Each layer's rotations, read from disk when they are asked for."""

    def __init__(self, store: Store, layers: int):
        self._store, self._layers = store, range(layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: Any) -> Any:
        tensors = self._store.load(_name(self._layers[layer]))
        return {site: {"input_blocks": rotation} for site, rotation in tensors.items()}


def _name(layer: int) -> str:
    return f"rotations-{layer:05d}"


def _activations(run: Run, hidden: HiddenStates, layer: int) -> dict[str, torch.Tensor]:
    """Run a layer; returns inputs of attention, MLP and o_proj, and the values, [sequences, length, features] float32.

    They are on the CPU. Norm gains are folded into the weights.
    """
    size, device = hidden.values.shape[:2], run.devices[0]
    features = _features(run.source.shape)
    seen = {site: run.store.scratch.empty(*size, width) for site, width in features.items()}
    filled = dict.fromkeys(features, 0)
    folded = fold_layer(run.source, layer, Transforms(None, None))
    state = {name: tensor.to(device) for name, tensor in folded.items()}

    def keep(site: str, x: torch.Tensor) -> None:
        seen[site].flatten(0, 1)[filled[site] : filled[site] + len(x)] = x
        filled[site] += len(x)

    def observe(module: str, x: torch.Tensor) -> None:
        keep(OBSERVED[module], x)
        if OBSERVED[module] == "qkv":
            weight, bias = state["self_attn.v_proj.weight"], state.get("self_attn.v_proj.bias")
            keep("v", torch.nn.functional.linear(x, weight, bias))

    hidden.forward_layer(state, list(OBSERVED), observe)
    return seen


def _features(shape: ModelShape) -> dict[str, int]:
    return {
        "qkv": shape.hidden_size,
        "o": shape.num_attention_heads * shape.head_dim,
        "gate_up": shape.hidden_size,
        "v": shape.num_key_value_heads * shape.head_dim,
    }
