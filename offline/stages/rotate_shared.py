"""Learn R1, the rotation of the residual stream, from the inputs of all layers (see `algorithms/psot.py`)."""

import torch

from infoquant_vllm.format import SITE_NORMS
from offline.algorithms.psot import SharedRotation
from offline.model.hidden_states import HiddenStates
from offline.run import Run
from offline.stages.experts import run_experts
from offline.stages.fold import fold_layer

POOL_STRIDE = 4
"""Tokens that run through the model for each one in the pool."""
SMALLEST_MEAN_SQUARE = torch.finfo(torch.float32).tiny
"""Of an input; embeddings of padding tokens are all zero, and stay zero when they are normalized."""
STEPS_PER_SAVE = 25
LEARNING = "learning-rotation"


def collect_inputs(run: Run, tokens: torch.Tensor) -> torch.Tensor:
    """Return normalized inputs of all layers' attention and MLP without the norms' gains, [rows, hidden] float32.

    Every site gives the same evenly spaced tokens of the first sequences, `psot.pool_tokens` rows in all. Where a site
    subtracts the mean of its inputs, the rows of each layer are less their mean.
    """
    layers, device = run.source.shape.num_hidden_layers, run.devices[0]
    rows_per_site = max(1, run.recipe.psot.pool_tokens // (2 * layers))
    sequences = tokens[: max(1, -(-POOL_STRIDE * rows_per_site // tokens.shape[1]))]
    stride = max(1, sequences.numel() // rows_per_site)
    hidden = HiddenStates(run.source, sequences, None, run.devices, run.store.scratch)
    sites, filled, parts = list(SITE_NORMS.values()), 0, dict[str, list[torch.Tensor]]()
    rows = layers * len(sites) * sum(-(-batch // stride) for batch in hidden.tokens_per_batch)
    size = rows, run.source.shape.hidden_size
    pool = run.store.scratch.empty(*size) if device.type == "cpu" else torch.empty(size, device=device)

    def observe(module: str, x: torch.Tensor) -> None:
        nonlocal filled
        chosen = x[::stride]
        mean_square = chosen.square().mean(1, keepdim=True).clamp(min=SMALLEST_MEAN_SQUARE)
        part = pool[filled : filled + len(chosen)].copy_(chosen * torch.rsqrt(mean_square))
        parts.setdefault(module, []).append(part)
        filled += len(chosen)

    for layer in range(layers):
        state = {name: tensor.to(device) for name, tensor in fold_layer(run.source, layer, None).items()}
        parts.clear()
        hidden.forward_layer(state, sites, observe)
        run_experts(run, hidden, layer, None)
        for site in run.recipe.centered_sites(run.source.shape, None) & SITE_NORMS.keys():
            _subtract_mean(parts[SITE_NORMS[site]])
        run.progress("sampling", layer + 1, layers)
    return pool


def _subtract_mean(parts: list[torch.Tensor]) -> None:
    """Subtract the mean of all rows from each part [rows, hidden], in place."""
    mean = torch.stack([part.sum(0) for part in parts]).sum(0) / sum(map(len, parts))
    for part in parts:
        part.sub_(mean)


def learn_rotation(run: Run, inputs: torch.Tensor, start: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return R1 [hidden, hidden] float64, learned from `start` on inputs [tokens, hidden].

    Saves the optimizer every STEPS_PER_SAVE steps, and continues from there.
    """
    args, group = run.recipe.psot, run.recipe.sites.qkv.input_activations.group_size
    groups = 1 if group is None else len(start) // group
    rotation = SharedRotation(inputs, start, groups, args.learning_rate, args.steps)
    if run.store.exists(LEARNING):
        state = run.store.load(LEARNING)
        rotation.load_state(state, run.store.metadata(LEARNING)["step"])
        generator.set_state(state["generator"])
    while rotation.done < args.steps:
        loss = rotation.step(torch.randint(len(inputs), (args.batch_tokens,), generator=generator))
        if run.store.persistent and rotation.done % STEPS_PER_SAVE == 0:
            state = rotation.state() | {"generator": generator.get_state()}
            run.store.save(LEARNING, state, step=rotation.done)
        run.progress("rotation", rotation.done, args.steps, f"smooth range {loss:.2f}")
    return rotation.matrix()
