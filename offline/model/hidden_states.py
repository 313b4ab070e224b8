"""The calibration text's hidden states, carried through the decoder one layer at a time."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from offline.algorithms.rotations import Transforms
from offline.errors import ToolError
from offline.model.architectures import empty_model, read_config
from offline.model.scratch import IN_MEMORY, Scratch
from offline.model.source import Source
from offline.model.windowed_attention import register_windowed_attention

TOKENS_PER_BATCH = 4096
ROWS_AT_A_TIME = 1024
"""Of a Hessian as it is completed."""
LARGEST_INPUT = 1e15  # sums of squares over millions of tokens stay below float32's 3e38
TOKENS_PER_SAMPLE = 16
"""Of the inputs that pass by, one in so many is kept."""

Observer = Callable[[str, torch.Tensor], None]
"""Called with a module's name inside the layer and its inputs, [tokens, features] float32."""


class Stream:
    """Unquantized hidden states [sequences, length, hidden] float32, as they enter the next layer.

    devices: each gets a copy of the layer and takes its turn at the batches; on the first is what is seen
    """

    def __init__(
        self,
        source: Source,
        tokens: torch.Tensor,
        transforms: Transforms | None,
        devices: Sequence[torch.device],
        scratch: Scratch = IN_MEMORY,
    ):
        config = read_config(source.shape, source.hf_config, source.folder / "config.json")
        config._attn_implementation = register_windowed_attention()
        model = empty_model(source.shape, config).model
        self._layer = model.layers[0].eval().requires_grad_(False)  # on meta: its weights come with each layer
        self.hidden = scratch.empty(*tokens.shape, source.shape.hidden_size)
        self._batch = max(1, TOKENS_PER_BATCH // tokens.shape[1])
        self.tokens_in_batches = [batch.numel() for batch in tokens.split(self._batch)]
        embeddings = source.tensor("model.embed_tokens.weight")
        rotation = None if transforms is None or transforms.residual is None else transforms.residual.float()
        for ids, batch in zip(tokens.split(self._batch), self.hidden.split(self._batch), strict=True):
            embedded = nn.functional.embedding(ids, embeddings).float()
            batch.copy_(embedded if rotation is None else embedded @ rotation)
        self._folder, self._next = source.folder, 0
        self._devices, first = devices, devices[0]
        positions = torch.arange(tokens.shape[1], device=first)[None]
        self._rotary_embedding = model.rotary_emb.to(first)
        self._rotary = self._rotary_embedding(self.hidden.new_empty(0), position_ids=positions)

    def advance(
        self, state: dict[str, torch.Tensor], modules: list[str], observe: Observer, outputs: tuple[str, ...] = ()
    ) -> None:
        """Run a layer with weights `state` (see `fold_layer`), which the first device does not copy.

        Shows what enters each of `modules` and, under its name too, what leaves each of `outputs`, batch
        after batch in the text's order whatever the number of devices: sums come out the same.
        """
        observe = self._bounded(observe)
        batches, several = self.hidden.split(self._batch), len(self._devices) > 1
        seen: list[list[tuple[str, torch.Tensor]]] = [[] for _ in self._devices]
        keepers = [lambda *one, own=own: own.append(one) for own in seen] if several else [observe]
        replicas = [
            _Replica(self._layer, state, device, self._rotary, modules, outputs, keep)
            for device, keep in zip(self._devices, keepers, strict=True)
        ]
        with ThreadPoolExecutor(len(replicas)) as pool:
            for start in range(0, len(batches), len(replicas)):
                list(pool.map(_Replica.run, replicas, batches[start : start + len(replicas)]))
                for own in seen:
                    for name, x in own:
                        observe(name, x.to(self._devices[0]))
                    own.clear()
        self._next += 1

    def restore(self, hidden: torch.Tensor, layer: int) -> None:
        """Go on with the hidden states that enter `layer`, as an earlier run kept them."""
        self.hidden.copy_(hidden)
        self._next = layer

    def _bounded(self, observe: Observer) -> Observer:
        """Return `observe` behind a check that its inputs are numbers whose squares can be summed."""
        place = f"{self._folder}: model.layers.{self._next}"

        def checked(module: str, x: torch.Tensor) -> None:
            least, greatest = torch.aminmax(x)
            largest = max(-least.item(), greatest.item())
            if not largest <= LARGEST_INPUT:
                raise ToolError(
                    f"{place}: values at {module} reach {largest:g} on the calibration text, at most "
                    f"{LARGEST_INPUT:g} can be quantized; check the source with `infoquant eval`"
                )
            observe(module, x)

        return checked

    def turn_mean(self, keys: torch.Tensor, positions: int) -> torch.Tensor:
        """Mean over the first `positions` of keys [kv_heads, head_dim], the same everywhere, behind RoPE."""
        where = torch.arange(positions, device=self._devices[0])[None]
        cos, sin = (t[0].mean(0) for t in self._rotary_embedding(self.hidden.new_empty(0), position_ids=where))
        first, second = keys.chunk(2, -1)
        return keys * cos + torch.cat((-second, first), -1) * sin

    def copy_layer(self) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        """A layer without weights, for others to fill, and the cosines and sines that it needs."""
        return copy.deepcopy(self._layer), self._rotary


class _Replica:
    """A layer on one device, which shows `observe` what enters `modules` and leaves `outputs`."""

    def __init__(
        self,
        layer: nn.Module,
        state: dict[str, torch.Tensor],
        device: torch.device,
        rotary: tuple[torch.Tensor, torch.Tensor],
        modules: list[str],
        outputs: tuple[str, ...],
        observe: Observer,
    ):
        self._layer, self._device = copy.deepcopy(layer), device
        self._layer.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
        self._rotary = tuple(part.to(device) for part in rotary)
        for name in modules:
            self._layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: observe(name, args[0].flatten(0, -2))
            )
        for name in outputs:
            self._layer.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: observe(name, out.flatten(2).flatten(0, 1))
            )

    @torch.no_grad()
    def run(self, batch: torch.Tensor) -> None:
        """Replace a batch of hidden states [sequences, length, hidden] by what leaves the layer."""
        entering = batch.to(self._device, copy=True)  # what is seen of it is looked at after `batch` is replaced
        batch.copy_(self._layer(entering, position_embeddings=self._rotary))


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
        """The whole matrices, which are symmetric; they are handed over, and can be asked for once."""
        found, self._upper = self._upper, {}
        for matrix in found.values():
            _mirror(matrix)
        return found

    def samples(self) -> dict[str, torch.Tensor]:
        """Some of the inputs."""
        return {module: torch.cat(parts) for module, parts in self._samples.items()}

    def rescale(self, module: str, scale: torch.Tensor) -> None:
        """Multiply the samples of a module's inputs by `scale` [features], as its weights were divided by it."""
        self._samples[module] = [part * scale for part in self._samples[module]]


def _mirror(matrix: torch.Tensor) -> None:
    """What is above the diagonal, below it too, in place."""
    for start in range(0, len(matrix), ROWS_AT_A_TIME):
        stop = start + ROWS_AT_A_TIME
        square = matrix[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
