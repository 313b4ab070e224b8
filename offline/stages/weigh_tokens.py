"""Weigh calibration tokens by what errors at their positions cost the loss, for the Hessians of GPTQ.

An error e of a linear's output changes the log-likelihood by g . e, with g its gradient, so that e costs (g . e)^2: the
Fisher information, where the token that is predicted is drawn from the model. GuidedQuant (Kim et al., arXiv
2505.07004, section 3) weighs each token by |g|^2 in the sum that makes the Hessian. Here all outputs of a site share
one weight per token. It is |g|, because with |g|^2 a few tokens would make up the sum.
"""

import torch
from torch import nn
from torch.nn import functional

from infoquant_vllm.format import SITES
from offline.errors import ToolError
from offline.run import Run

KEPT = "token-weights"


def weigh_tokens(run: Run, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weight of each calibration token at each site, [tokens] float32 with mean 1.

    Keys are full names of the sites' first linears. tokens: int64 [sequences, length]; one sequence at a time runs
    through the whole model and back.
    """
    if run.store.exists(KEPT):
        return run.store.load(KEPT)
    with run.watch(KEPT):
        weights = {name: _weights(energy, name) for name, energy in _gradient_energies(run, tokens).items()}
    run.store.save(KEPT, weights)  # not only to resume: a budget's measurement reads them too
    return weights


def _gradient_energies(run: Run, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return |g|^2 over the outputs of each site, [tokens] float32 each, by the site's first linear."""
    device = run.devices[0]
    model = run.source.model(torch.float32)
    nn.Module.to(model, device)
    generator = torch.Generator(device).manual_seed(run.seed)
    energies = {
        f"model.layers.{layer}.{linears[0]}": torch.zeros(tokens.shape)
        for layer in range(run.source.shape.num_hidden_layers)
        for linears in SITES.values()
    }
    row: dict[str, torch.Tensor] = {}
    for layer, decoder_layer in enumerate(model.model.layers):
        for linears in SITES.values():
            for linear in linears:
                _observe_gradient(decoder_layer.get_submodule(linear), f"model.layers.{layer}.{linears[0]}", row)
    for index, ids in enumerate(tokens):
        row.clear()
        embedded = model.model.embed_tokens(ids[None].to(device)).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        if not logits.isfinite().all():
            raise ToolError(
                f"{run.source.folder}: logits are not finite on the calibration text; check it with `infoquant eval`"
            )
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for name, energy in row.items():
            energies[name][index] = energy.cpu()
        run.progress(KEPT, index + 1, len(tokens))
    return {name: energy.flatten() for name, energy in energies.items()}


def _observe_gradient(linear: nn.Module, name: str, row: dict[str, torch.Tensor]) -> None:
    """Add |g|^2 of the outputs of `linear` to row[name], [length], whenever a gradient runs through it."""

    def add(gradient: torch.Tensor) -> None:
        row[name] = row.get(name, 0) + gradient.flatten(0, -2).square().sum(1)

    def observe(_: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        out.register_hook(add)

    linear.register_forward_hook(observe)


def _weights(energy: torch.Tensor, name: str) -> torch.Tensor:
    """Return weights [tokens] of mean 1 from |g|^2; all 1 where no gradient arrives."""
    if not energy.isfinite().all():
        raise ToolError(f"{name}: gradients are not finite on the calibration text; use a recipe without `gptq.guided`")
    weights, mean = energy.sqrt(), energy.sqrt().mean()
    return weights / mean if mean > 0 else torch.ones_like(weights)
