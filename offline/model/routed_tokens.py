"""The inputs of a layer's mixture of experts, and which expert gets which of them."""

from typing import Any

import torch
from torch.nn import functional

from infoquant_vllm.format import Experts
from offline.model.experts import Routing

TOKENS_AT_A_TIME = 4096
"""Tokens that run through an expert at once; bounds peak memory."""


class RoutedTokens:
    """Inputs [tokens, hidden] float32 of a mixture, in the order of the calibration text, and the router's choices.

    router: of transformers, without a weight of its own; each layer sets it
    """

    def __init__(self, router: Any, names: Experts, inputs: torch.Tensor):
        self._router, self._names, self.inputs = router, names, inputs
        self._routings: list[Routing] = []
        self._routing: Routing | None = None

    def begin(self, router_weight: torch.Tensor) -> None:
        """Forget the tokens of the previous layer."""
        self._router.load_state_dict({"weight": router_weight}, assign=True)
        self._routings, self._routing, self._filled = [], None, 0

    def add(self, x: torch.Tensor) -> None:
        """Add inputs x [tokens, hidden] of the mixture."""
        self.inputs[self._filled : self._filled + len(x)] = x
        self._filled += len(x)
        self._routings.append(Routing(*self._router(x)))

    @property
    def routing(self) -> Routing:
        """The choices for all tokens."""
        if self._routing is None:
            self._routing = Routing(*(torch.cat(parts) for parts in zip(*self._routings, strict=True)))
            self._routings = []
        return self._routing

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens that the router sends to an expert, and the weights of its outputs."""
        tokens, place = (self.routing.chosen == expert).nonzero(as_tuple=True)
        weights = self.routing.weights[tokens, place].float()
        return tokens.to(self.inputs.device), weights.to(self.inputs.device)

    def dealt_to(self, expert: int, count: int) -> torch.Tensor:
        """Return the `count` tokens that have the highest score for an expert among those that it does not get.

        Calibration data dealt to experts that see little of it, as in EAQuant (Fu et al., 2025, arXiv 2506.13329).
        """
        scores = self.routing.scores.softmax(-1)[:, expert]
        scores = scores.masked_fill((self.routing.chosen == expert).any(1), -1)
        return scores.topk(min(count, int((scores >= 0).sum()))).indices.to(self.inputs.device)

    def forward(self, state: dict[str, torch.Tensor], expert: int, tokens: torch.Tensor, observe: Any) -> torch.Tensor:
        """Return the outputs of an expert for some tokens, [tokens, hidden]; observes the inputs of its linears.

        state: weights by names inside the layer, as `fold_expert` returns them
        """
        place = self._names.expert(expert)
        gate, up, down = (f"{place}.{name}" for name in (self._names.gate, self._names.up, self._names.down))
        found = self.inputs.new_empty(len(tokens), self.inputs.shape[1])
        for start in range(0, len(tokens), TOKENS_AT_A_TIME):
            some, out = (part[start : start + TOKENS_AT_A_TIME] for part in (tokens, found))
            x = self.inputs[some].to(state[f"{gate}.weight"].device)
            observe(gate, x)
            inner = functional.silu(x @ state[f"{gate}.weight"].T) * (x @ state[f"{up}.weight"].T)
            observe(down, inner)
            out.copy_(inner @ state[f"{down}.weight"].T)
        return found
