"""Hidden states of the calibration tokens, which run through the decoder one layer at a time."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from infoquant_vllm.format import Experts
from offline.algorithms.rotations import Transforms
from offline.errors import ToolError
from offline.model.architectures import HEADS_FIRST, embedding_scale, empty_model, read_config, rope_arguments
from offline.model.experts import SharedPart, replace_block
from offline.model.routed_tokens import RoutedTokens
from offline.model.scratch import IN_MEMORY, Scratch
from offline.model.source import Source
from offline.model.windowed_attention import WINDOWED, register_attention, windowed_attention

TOKENS_PER_BATCH = 4096
OUTPUT = ".output"
"""Ends the names that observers get outputs under."""
LARGEST_INPUT = 1e15  # sums of squares over millions of tokens stay below float32's 3e38

Observer = Callable[[str, torch.Tensor], None]
"""Called with a module's name inside the layer and its inputs, [tokens, features] float32."""
Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of RoPE, [1, length, head_dim] each."""


class HiddenStates:
    """Hidden states [sequences, length, hidden] float32 of the unquantized model, as they enter the next layer.

    devices: each holds a copy of the layer and runs its share of the batches; observers run on the first
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
        config._attn_implementation = register_attention(WINDOWED, windowed_attention)
        model = empty_model(source.shape, config).model
        self._layers = model.layers.eval().requires_grad_(False)  # on meta: weights come with each layer
        self.values = scratch.empty(*tokens.shape, source.shape.hidden_size)
        self.routed = self._without_experts(source.shape.experts, devices[0], scratch)
        self._batch = max(1, TOKENS_PER_BATCH // tokens.shape[1])
        self.tokens_per_batch = [batch.numel() for batch in tokens.split(self._batch)]
        embeddings = source.tensor("model.embed_tokens.weight")
        scale = embedding_scale(model, embeddings.dtype)
        rotation = None if transforms is None or transforms.residual is None else transforms.residual.float()
        for ids, batch in zip(tokens.split(self._batch), self.values.split(self._batch), strict=True):
            embedded = nn.functional.embedding(ids, embeddings).float() * scale
            batch.copy_(embedded if rotation is None else embedded @ rotation)
        self._folder, self._next, self._heads_first = source.folder, 0, source.shape.architecture in HEADS_FIRST
        self.max_positions = int(getattr(config, "max_position_embeddings", tokens.shape[1]))
        self._residual_multiplier = float(getattr(config, "residual_multiplier", 1))
        self._devices = devices
        self._rotary_embedding = model.rotary_emb.to(devices[0])
        self._length = tokens.shape[1]
        self._rope_arguments = [
            rope_arguments(source.shape, config, layer) for layer in range(source.shape.num_hidden_layers)
        ]

    def forward_layer(
        self, state: dict[str, torch.Tensor], modules: list[str], observe: Observer, outputs: tuple[str, ...] = ()
    ) -> None:
        """Replace the hidden states by the outputs of a layer with weights `state` (see `fold_layer`).

        Calls `observe` with the inputs of each of `modules` and the outputs of each of `outputs`, under its name with
        OUTPUT, batch after batch in the order of the tokens for any number of devices: sums come out the same.

        The outputs of experts that a router chooses are left out; `forward_expert` adds them.
        """
        observe, rotary = self._bounded(observe, self._next), self._rotary_of(self._next, self._length)
        if self.routed is not None:
            modules, observe = [*modules, self._block], self._routing_first(observe, state)
        batches, several = self.values.split(self._batch), len(self._devices) > 1
        seen: list[list[tuple[str, torch.Tensor]]] = [[] for _ in self._devices]
        keepers = [lambda *one, own=own: own.append(one) for own in seen] if several else [observe]
        replicas = [
            _Replica(self._layers[self._next], state, device, rotary, keep)
            for device, keep in zip(self._devices, keepers, strict=True)
        ]
        for replica in replicas:
            replica.hook(modules, outputs, self._heads_first)
        with ThreadPoolExecutor(len(replicas)) as pool:
            for start in range(0, len(batches), len(replicas)):
                list(pool.map(_Replica.run, replicas, batches[start : start + len(replicas)]))
                for own in seen:
                    for name, x in own:
                        observe(name, x.to(self._devices[0]))
                    own.clear()
        self._next += 1

    def forward_expert(
        self, expert: int, state: dict[str, torch.Tensor], observe: Observer, least: int = 0
    ) -> tuple[int, int]:
        """Add the outputs of one expert with weights `state` to those of its layer (see `fold_expert`).

        Calls `observe` with the inputs of its gate and of its down projection. Where the router sends it fewer than
        `least` tokens, others are dealt to it, which are observed only. Returns how many were routed and dealt.
        """
        assert self.routed is not None
        observe, values = self._bounded(observe, self._next - 1), self.values.flatten(0, 1)
        tokens, weights = self.routed.tokens_of(expert)
        weights = weights * self._residual_multiplier
        out = self.routed.forward(state, expert, tokens, observe)
        values.index_add_(0, tokens, out * weights[:, None])
        dealt = self.routed.dealt_to(expert, max(0, least - len(tokens)))
        self.routed.forward(state, expert, dealt, observe)
        return len(tokens), len(dealt)

    def _without_experts(self, names: Experts | None, device: torch.device, scratch: Scratch) -> RoutedTokens | None:
        """Take the experts that a router chooses out of the layer; `forward_expert` runs them one by one."""
        if names is None:
            return None
        for layer in self._layers:
            block: Any = layer.get_submodule(names.block)
            router = copy.deepcopy(block.gate)
            replace_block(layer, names, SharedPart(block))
        self._block = names.block
        tokens, hidden = self.values.flatten(0, 1).shape
        return RoutedTokens(router, names, scratch.empty(tokens, hidden))

    def _routing_first(self, observe: Observer, state: dict[str, torch.Tensor]) -> Observer:
        """Give the inputs of the mixture to `self.routed`, and those of other modules to `observe`."""
        assert self.routed is not None
        routed = self.routed
        routed.begin(state[f"{self._block}.gate.weight"])

        def keep(module: str, x: torch.Tensor) -> None:
            if module == self._block:
                routed.add(x)
            else:
                observe(module, x)

        return keep

    def restore(self, values: torch.Tensor, layer: int) -> None:
        """Continue with the hidden states that enter `layer`, as an earlier run saved them."""
        self.values.copy_(values)
        self._next = layer

    def _bounded(self, observe: Observer, layer: int) -> Observer:
        """Wrap `observe` in a check that its inputs are finite and small enough to sum their squares."""
        place = f"{self._folder}: model.layers.{layer}"

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

    def rotary(self, positions: int) -> Rotary:
        """Return the cosines and sines of RoPE at the first `positions`, in the layer that was run last."""
        return self._rotary_of(self._next - 1, positions)

    def _rotary_of(self, layer: int, positions: int) -> Rotary:
        where = torch.arange(positions, device=self._devices[0])[None]
        cos, sin = self._rotary_embedding(self.values.new_empty(0), where, *self._rope_arguments[layer])
        return cos, sin

    @property
    def rotates_keys(self) -> bool:
        """Return whether the layer that was run last applies RoPE."""
        return bool(getattr(self._layers[self._next - 1].self_attn, "use_rope", True))

    def copy_layer(self) -> tuple[nn.Module, Rotary]:
        """Return the layer that was run last, without weights, for the caller to fill, and its cosines and sines."""
        return copy.deepcopy(self._layers[self._next - 1]), self.rotary(self._length)


class _Replica:
    """A layer on one device."""

    def __init__(
        self, layer: nn.Module, state: dict[str, torch.Tensor], device: torch.device, rotary: Rotary, observe: Observer
    ):
        self._layer, self._device, self._observe = copy.deepcopy(layer), device, observe
        self._layer.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
        self._rotary = tuple(part.to(device) for part in rotary)

    def hook(self, modules: list[str], outputs: tuple[str, ...], heads_first: bool) -> None:
        """Call `observe` with the inputs of `modules` and the outputs of `outputs`, whenever the layer runs.

        Hooks do not know the replica: a circle of references would keep the weights until a garbage collection.
        """
        observe = self._observe
        for name in modules:
            self._layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: observe(name, args[0].flatten(0, -2))
            )
        for name in outputs:
            self._layer.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: observe(name + OUTPUT, _by_token(out, heads_first))
            )

    @torch.no_grad()
    def run(self, batch: torch.Tensor) -> None:
        """Replace a batch of hidden states [sequences, length, hidden] by the layer's outputs."""
        entering = batch.to(self._device, copy=True)  # observers may look at it after `batch` is replaced
        batch.copy_(self._layer(entering, position_embeddings=self._rotary))


def _by_token(out: torch.Tensor, heads_first: bool) -> torch.Tensor:
    """Return outputs of a linear or of a norm of heads (see HEADS_FIRST) as [tokens, features]."""
    by_token = out.transpose(1, 2) if heads_first and out.dim() == 4 else out
    return by_token.flatten(2).flatten(0, 1)
