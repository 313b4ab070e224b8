"""The calibration text's hidden states, carried through the decoder one layer at a time."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from offline.architectures import empty_model, read_config
from offline.attention import register_windowed_attention
from offline.source import Source
from offline.transforms import Transforms

TOKENS_PER_BATCH = 4096
TOKENS_PER_SAMPLE = 16
"""Of the inputs that pass by, one in so many is kept."""

Observer = Callable[[str, torch.Tensor], None]
"""Called with a module's name inside the layer and its inputs, [tokens, features] float32."""


class Stream:
    """Unquantised hidden states [sequences, length, hidden] float32, as they enter the next layer."""

    def __init__(self, source: Source, tokens: torch.Tensor, transforms: Transforms | None, device: torch.device):
        config = read_config(source.shape, source.hf_config, source.folder / "config.json")
        config._attn_implementation = register_windowed_attention()
        model = empty_model(source.shape, config).model
        self._layer = model.layers[0].to_empty(device=device).eval().requires_grad_(False)
        self.hidden = nn.functional.embedding(tokens, source.tensor("model.embed_tokens.weight")).float()
        if transforms is not None and transforms.residual is not None:
            self.hidden = self.hidden @ transforms.residual.float()
        self._device = device
        positions = torch.arange(tokens.shape[1], device=device)[None]
        self._rotary_embedding = model.rotary_emb.to(device)
        self._rotary = self._rotary_embedding(self.hidden.new_empty(0), position_ids=positions)

    @torch.no_grad()
    def advance(
        self, state: dict[str, torch.Tensor], modules: list[str], observe: Observer, outputs: tuple[str, ...] = ()
    ) -> None:
        """Run a layer with weights `state` (see `fold_layer`).

        Shows what enters each of `modules` and, under its name too, what leaves each of `outputs`.
        """
        self._layer.load_state_dict(state)
        handles = [
            self._layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: observe(name, args[0].flatten(0, -2))
            )
            for name in modules
        ] + [
            self._layer.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: observe(name, out.flatten(2).flatten(0, 1))
            )
            for name in outputs
        ]
        try:
            for batch in self.hidden.split(max(1, TOKENS_PER_BATCH // self.hidden.shape[1])):
                batch.copy_(self._layer(batch.to(self._device), position_embeddings=self._rotary))
        finally:
            for handle in handles:
                handle.remove()

    def turn_mean(self, keys: torch.Tensor, positions: int) -> torch.Tensor:
        """Mean over the first `positions` of keys [kv_heads, head_dim], the same everywhere, behind RoPE."""
        where = torch.arange(positions, device=self._device)[None]
        cos, sin = (t[0].mean(0) for t in self._rotary_embedding(self.hidden.new_empty(0), position_ids=where))
        first, second = keys.chunk(2, -1)
        return keys * cos + torch.cat((-second, first), -1) * sin

    def copy_layer(self) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        """The layer that ran last, for others to change, and the cosines and sines that it needs."""
        return copy.deepcopy(self._layer), self._rotary


class Statistics:
    """What rounding needs to know of a layer's inputs, by the name of the module that they enter.

    hessians: sums of x^T x, [features, features] (half a Hessian, which GPTQ cannot tell)
    energies: sums of x^2 / |x|^2, [features], every token counting the same
    sums: of x, [features]
    tokens: how many there were
    samples: [some, features], evenly spaced among them
    """

    def __init__(self) -> None:
        self._upper: dict[str, torch.Tensor] = {}
        self.energies: dict[str, torch.Tensor] = {}
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._samples: dict[str, list[torch.Tensor]] = {}

    def observe(self, module: str, x: torch.Tensor) -> None:
        """Add inputs x [tokens, features]; an `Observer`."""
        features = x.shape[1]
        if module not in self._upper:
            self._upper[module], self.energies[module] = x.new_zeros(features, features), x.new_zeros(features)
            self.sums[module], self.tokens[module], self._samples[module] = x.new_zeros(features), 0, []
        step = max(64, -(-features // 4))
        for start in range(0, features, step):  # the upper triangle, by strips
            self._upper[module][start : start + step, start:].addmm_(x[:, start : start + step].T, x[:, start:])
        share = 1 / x.square().sum(1).clamp(min=torch.finfo(x.dtype).tiny)
        self.energies[module] += share @ x.square()
        self.sums[module] += x.sum(0)
        self.tokens[module] += len(x)
        self._samples[module].append(x[::TOKENS_PER_SAMPLE].clone())

    def hessians(self) -> dict[str, torch.Tensor]:
        """The whole matrices; they are symmetric."""
        return {module: upper.triu() + upper.triu(1).T for module, upper in self._upper.items()}

    def samples(self) -> dict[str, torch.Tensor]:
        """Some of the inputs."""
        return {module: torch.cat(parts) for module, parts in self._samples.items()}

    def rescale(self, module: str, scale: torch.Tensor) -> None:
        """Multiply the samples of a module's inputs by `scale` [features], as its weights were divided by it."""
        self._samples[module] = [part * scale for part in self._samples[module]]
