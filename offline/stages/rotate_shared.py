"""A model's rotations; that of the residual stream learned so that rotated activations span a small range.

One orthogonal matrix for all layers instead of InfoQuant's one per input (arXiv 2605.26175), with
the squared range as objective: it then folds into the weights and costs nothing at run time.
"""

import math

import torch

from infoquant_vllm.format import SITE_NORMS
from offline.algorithms.rotations import Transforms, random_hadamard, random_head_rotations
from offline.model.hidden_states import HiddenStates
from offline.model.source import Source
from offline.output.store import Store
from offline.progress import ProgressReport
from offline.recipe import Psot, Recipe
from offline.stages.fold import fold_layer
from offline.stages.rotate_per_layer import learn_layer_rotations

TOKENS_SEEN_PER_TOKEN_POOLED = 4
SMALLEST_ENERGY = torch.finfo(torch.float32).tiny
"""Mean square of an input; embeddings of padding tokens are all zero, and stay so when they are normalized."""
STEPS_KEPT = 25
LEARNING, ADAM_STATE = "learning-rotation", ("step", "exp_avg", "exp_avg_sq")


def make_transforms(
    source: Source,
    recipe: Recipe,
    tokens: torch.Tensor | None,
    seed: int,
    devices: list[torch.device],
    progress: ProgressReport,
    store: Store,
) -> Transforms | None:
    """The rotations that the recipe asks for; None for transform `none`, the only one that needs no tokens."""
    if recipe.transform == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    if recipe.transform == "psot-layer" and tokens is not None:
        return learn_layer_rotations(source, tokens, recipe.psot_layer, generator, devices, progress, store)
    residual = random_hadamard(source.shape.hidden_size, generator)
    heads = random_head_rotations(source.shape, generator)
    if recipe.transform == "psot-shared" and tokens is not None:
        inputs = collect_inputs(source, tokens, recipe.psot, devices, progress, store)
        group = recipe.sites.qkv.input_activations.group_size
        groups = 1 if group is None else source.shape.hidden_size // group
        residual = learn_rotation(inputs, residual, groups, recipe.psot, generator, progress, store)
    return Transforms(residual, heads)


def collect_inputs(
    source: Source,
    tokens: torch.Tensor,
    args: Psot,
    devices: list[torch.device],
    progress: ProgressReport,
    store: Store,
) -> torch.Tensor:
    """Normalized inputs of all layers' attention and MLP, norms' gains left out, [rows, hidden] float32.

    Every site gives the same evenly spaced tokens of the first sequences, `pool_tokens` rows in all.
    """
    layers = source.shape.num_hidden_layers
    per_site = max(1, args.pool_tokens // (2 * layers))
    sequences = tokens[: max(1, -(-TOKENS_SEEN_PER_TOKEN_POOLED * per_site // tokens.shape[1]))]
    stride = max(1, sequences.numel() // per_site)
    hidden = HiddenStates(source, sequences, None, devices, store.scratch)
    sites, taken = list(SITE_NORMS.values()), 0
    rows = layers * len(sites) * sum(-(-batch // stride) for batch in hidden.tokens_per_batch)
    size = rows, source.shape.hidden_size
    pool = store.scratch.empty(*size) if devices[0].type == "cpu" else torch.empty(size, device=devices[0])

    def observe(_: str, x: torch.Tensor) -> None:
        nonlocal taken
        chosen = x[::stride]
        energy = chosen.square().mean(1, keepdim=True).clamp(min=SMALLEST_ENERGY)
        pool[taken : taken + len(chosen)] = chosen * torch.rsqrt(energy)
        taken += len(chosen)

    for layer in range(layers):
        state = {name: tensor.to(devices[0]) for name, tensor in fold_layer(source, layer, None).items()}
        hidden.forward_layer(state, sites, observe)
        progress("sampling", layer + 1, layers)
    return pool


def learn_rotation(
    inputs: torch.Tensor,
    start: torch.Tensor,
    groups: int,
    args: Psot,
    generator: torch.Generator,
    progress: ProgressReport,
    store: Store | None = None,
) -> torch.Tensor:
    """An orthogonal matrix [hidden, hidden] float64, start @ Cayley(P - P^T), P learned from 0.

    inputs: [tokens, hidden] float32 or bfloat16, normalized inputs of all layers without the norms' gains
    start: [hidden, hidden] float64, a random Hadamard
    groups: how many ranges a token is quantized with
    store: where the optimization is kept every STEPS_KEPT steps, and gone on from
    """
    hidden = len(start)
    base = start.to(inputs.device, torch.float32)
    parameter = torch.zeros(hidden, hidden, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=args.learning_rate, betas=(0.9, 0.99))
    done = 0 if store is None else _restore(store, parameter, optimizer, generator)
    for step in range(done, args.steps):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (0.5 * (1 + math.cos(math.pi * step / args.steps)))
        rows = torch.randint(len(inputs), (args.batch_tokens,), generator=generator).to(inputs.device)
        loss = squared_range(((inputs[rows].float() @ base) @ cayley(parameter)).unflatten(1, (groups, -1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if store is not None and store.persistent and (step + 1) % STEPS_KEPT == 0:
            state = {name: optimizer.state[parameter][name] for name in ADAM_STATE}
            state |= {"parameter": parameter, "generator": generator.get_state()}
            store.save(LEARNING, state, step=step + 1)
        progress("rotation", step + 1, args.steps, f"squared range {loss.item():.2f}")
    with torch.no_grad():
        return start @ cayley(parameter.double()).cpu()


def _restore(
    store: Store, parameter: torch.Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> int:
    """Set everything back to how it was kept; returns the number of steps that were done, 0 where none is."""
    if not store.exists(LEARNING):
        return 0
    state = store.load(LEARNING)
    with torch.no_grad():
        parameter.copy_(state["parameter"])
    moments = {name: state[name].clone().to(parameter.device) for name in ADAM_STATE if name != "step"}
    optimizer.state[parameter] = {"step": state["step"].clone(), **moments}
    generator.set_state(state["generator"])
    done: int = store.metadata(LEARNING)["step"]
    return done


def cayley(parameter: torch.Tensor) -> torch.Tensor:
    """(I + A)^-1 (I - A) with A = P - P^T: a rotation for any square P, the identity for P = 0."""
    skew = parameter - parameter.T
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew, eye - skew)


def squared_range(y: torch.Tensor) -> torch.Tensor:
    """Mean over ranges of (max(y, 0) - min(y, 0))^2, y [..., values], which quantizers' errors are proportional to."""
    return (y.amax(-1).clamp(min=0) - y.amin(-1).clamp(max=0)).square().mean()
