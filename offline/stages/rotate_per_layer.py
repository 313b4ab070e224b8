"""InfoQuant's own rotations (arXiv 2605.26175), one per layer and input, learned to press down peaks.

Each acts on the input of its linears at run time, so the residual stream stays in the source's
basis; only those of the values fold into the weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from offline.algorithms.outlier_tokens import outlier_weights
from offline.algorithms.rotations import InputTensors, Transforms, random_hadamard, random_head_rotations
from offline.algorithms.stiefel import cayley_step, retract
from offline.model.hidden_states import HiddenStates
from offline.model.source import Source
from offline.output.store import Store
from offline.progress import ProgressReport
from offline.recipe import PsotLayer
from offline.stages.fold import fold_layer

NEXT = "next-rotations"
"""What the next layer's rotations are learned from is kept under that name."""
LAYERS_WITHOUT_OUTLIERS = 2
"""The first layers, whose tokens all weigh the same."""

Loss = Callable[[torch.Tensor, slice], torch.Tensor]
"""Of rotations [matrices, size, size], over some of the sequences."""


def learn_layer_rotations(
    source: Source,
    tokens: torch.Tensor,
    args: PsotLayer,
    generator: torch.Generator,
    devices: list[torch.device],
    progress: ProgressReport,
    store: Store,
) -> Transforms:
    """Rotations for the attention input, the MLP input and the values of every layer.

    Four activations of one layer, each up to as large as the calibration text's hidden states, are there
    at a time, on disk where memory is short; the rotations of the inputs are kept in `store`.
    """
    shape = source.shape
    heads = random_head_rotations(shape, generator)
    hidden, done, device = HiddenStates(source, tokens, None, devices, store.scratch), 0, devices[0]
    if store.exists(NEXT):
        kept, done = store.load(NEXT), store.metadata(NEXT)["layer"]
        hidden.restore(kept["hidden"], done)
        heads.copy_(kept["heads"])
        generator.set_state(kept["generator"])
    for layer in range(done, shape.num_hidden_layers):
        seen = _activations(source, hidden, layer, device, store)
        weight = 1.0 if layer < LAYERS_WITHOUT_OUTLIERS else args.outlier_weight
        weights = {name: outlier_weights(x.flatten(2), weight) for name, x in seen.items()}
        rotations, losses = {}, []
        for site in ("qkv", "gate_up"):
            x = seen[site].unflatten(2, (args.blocks, 1, -1))
            start = torch.stack([random_hadamard(x.shape[-1], generator) for _ in range(args.blocks)])
            loss = input_loss(x, weights[site], args.temperature, device)
            rotations[site], fall = _learn(start, loss, len(tokens), args, generator, device)
            losses.append(fall)
        outputs = seen["o"].unflatten(2, (shape.num_key_value_heads, -1, shape.head_dim))
        values = seen["v"].unflatten(2, (shape.num_key_value_heads, 1, shape.head_dim))
        pairs = ((outputs, weights["o"]), (values, weights["v"]))
        heads[layer], fall = _learn(
            heads[layer], head_loss(*pairs, args.temperature, device), len(tokens), args, generator, device
        )
        store.save(_name(layer), {site: rotation.float() for site, rotation in rotations.items()})
        if store.persistent:
            state = {"hidden": hidden.values, "heads": heads, "generator": generator.get_state()}
            store.save(NEXT, state, layer=layer + 1)
        falls = ", ".join(f"{fall:.3f}" for fall in (*losses, fall))
        progress("rotations", layer + 1, shape.num_hidden_layers, f"losses at {falls} of the first epoch")
    return Transforms(None, heads, _KeptInputs(store, shape.num_hidden_layers))


class _KeptInputs(Sequence[dict[str, InputTensors]]):
    """Each layer's rotations, read when they are asked for."""

    def __init__(self, store: Store, layers: int):
        self._store, self._layers = store, range(layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: Any) -> Any:
        tensors = self._store.load(_name(self._layers[layer]))
        return {site: {"input_blocks": rotation} for site, rotation in tensors.items()}


def _name(layer: int) -> str:
    return f"rotations-{layer:05d}"


def _activations(
    source: Source, hidden: HiddenStates, layer: int, device: torch.device, store: Store
) -> dict[str, torch.Tensor]:
    """Inputs of attention, MLP and o_proj, and the values, [sequences, length, features] float32 on the CPU.

    Norm gains are folded into the weights. Runs the layer.
    """
    modules, shape = {"self_attn.q_proj": "qkv", "self_attn.o_proj": "o", "mlp.gate_proj": "gate_up"}, source.shape
    features = {
        "qkv": shape.hidden_size,
        "o": shape.num_attention_heads * shape.head_dim,
        "gate_up": shape.hidden_size,
        "v": shape.num_key_value_heads * shape.head_dim,
    }
    size = hidden.values.shape[:2]
    seen, filled = (
        {site: store.scratch.empty(*size, width) for site, width in features.items()},
        dict.fromkeys(features, 0),
    )
    state = {name: tensor.to(device) for name, tensor in fold_layer(source, layer, Transforms(None, None)).items()}

    def keep(site: str, x: torch.Tensor) -> None:
        seen[site].flatten(0, 1)[filled[site] : filled[site] + len(x)] = x
        filled[site] += len(x)

    def observe(module: str, x: torch.Tensor) -> None:
        keep(modules[module], x)
        if modules[module] == "qkv":
            weight, bias = state["self_attn.v_proj.weight"], state.get("self_attn.v_proj.bias")
            keep("v", torch.nn.functional.linear(x, weight, bias))

    hidden.forward_layer(state, list(modules), observe)
    return seen


def input_loss(x: torch.Tensor, weights: torch.Tensor, temperature: float, device: torch.device) -> Loss:
    """The peaks of an input x [sequences, length, blocks, 1, size], found among all its features."""

    def loss(rotations: torch.Tensor, sequences: slice) -> torch.Tensor:
        rotated = rotate(x[sequences].to(device), rotations)
        return peak_norm(center(rotated).flatten(2), weights[sequences].to(device), temperature)

    return loss


def head_loss(
    outputs: tuple[torch.Tensor, torch.Tensor],
    values: tuple[torch.Tensor, torch.Tensor],
    temperature: float,
    device: torch.device,
) -> Loss:
    """The peaks of o_proj's inputs and of the values, found in each head, both counting the same.

    Each a pair of activations [sequences, length, kv_heads, heads of each, head_dim] and token weights.
    """

    def loss(rotations: torch.Tensor, sequences: slice) -> torch.Tensor:
        first, second = (
            peak_norm(
                center(rotate(x[sequences].to(device), rotations)),
                weights[sequences, :, None, None].to(device),
                temperature,
            )
            for x, weights in (outputs, values)
        )
        return first + second * torch.where(second > 0, first / second, 1.0).detach()

    return loss


def rotate(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """x [..., matrices, rows, size] times rotations [matrices, size, size]."""
    return torch.einsum("...krd,kde->...kre", x, rotations)


def center(x: torch.Tensor) -> torch.Tensor:
    """x less its mean over the last axis."""
    return x - x.mean(-1, keepdim=True)


def peak_norm(y: torch.Tensor, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """Frobenius norm of p A w, A = |y|, p = softmax(A / temperature) over the last axis.

    y: [..., features]
    weights: [...], of whole rows
    """
    size = y.abs()
    return ((size / temperature).softmax(-1) * size * weights[..., None]).norm()


def _learn(
    start: torch.Tensor,
    loss: Loss,
    sequences: int,
    args: PsotLayer,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[torch.Tensor, float]:
    """Rotations [matrices, size, size] float64, learned from `start`; and the share of the loss that is left.

    Inputs that are all zero have no peaks: their loss is 0, and the rotations stay as they are.
    """
    rotations = start.to(device, torch.float32)
    batches = [slice(first, first + args.batch_sequences) for first in range(0, sequences, args.batch_sequences)]
    losses = []
    for rate in torch.linspace(args.learning_rate, args.last_learning_rate, args.epochs).tolist():
        total = 0.0
        for batch in batches:
            rotations.requires_grad_()
            value = loss(rotations, batch)
            (gradient,) = torch.autograd.grad(value, rotations)
            rotations = cayley_step(rotations.detach(), gradient, rate, generator)
            total += value.item()
        losses.append(total)
    return retract(rotations.double()).cpu(), losses[-1] / losses[0] if losses[0] > 0 else 1.0
