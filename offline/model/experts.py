"""Mixtures of experts as modules of the names in the files: transformers holds the weights of all experts as one."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from infoquant_vllm.format import Experts, ModelShape


class Routing(NamedTuple):
    """The choice of a router: scores [tokens, experts], and weights and indices of the chosen [tokens, chosen]."""

    scores: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor


class Expert(nn.Module):
    """A gated MLP whose linears have the names that an architecture gives them."""

    def __init__(self, names: Experts, act_fn: nn.Module, gate_up: torch.Tensor, down: torch.Tensor):
        super().__init__()
        self._names, self.act_fn = names, act_fn
        gate, up = gate_up.chunk(2)
        for name, weight in ((names.gate, gate), (names.up, up), (names.down, down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [tokens, hidden] to outputs of the same shape."""
        gate, up, down = (self.get_submodule(name) for name in (self._names.gate, self._names.up, self._names.down))
        return down(self.act_fn(gate(x)) * up(x))


class SoftmaxTopKRouter(nn.Module):
    """A router of the class of Granite, whose outputs transformers has in another order."""

    def __init__(self, router: Any):
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k

    def forward(self, x: torch.Tensor) -> Routing:
        """Choose experts for x [tokens, hidden]; their weights are the softmax of their scores."""
        scores = functional.linear(x, self.weight)
        highest, chosen = scores.float().topk(self.top_k, dim=-1)
        return Routing(scores, highest.softmax(-1).to(x.dtype), chosen)


class SeparateExperts(nn.Module):
    """A mixture with a module for each expert, and the router and the shared expert of transformers' own block.

    A token's outputs are summed in float32, in the order in which the router names its experts, and then rounded.
    """

    def __init__(self, block: Any, names: Experts):
        super().__init__()
        fused = block.experts
        weights = zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True)
        self.gate = block.gate if hasattr(block, "gate") else SoftmaxTopKRouter(block.router)
        self.experts = nn.ModuleList(Expert(names, fused.act_fn, *pair) for pair in weights)
        self.shared_expert = getattr(block, "shared_expert", None)
        self.shared_expert_gate = getattr(block, "shared_expert_gate", None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden [..., hidden_size] to the outputs of the mixture."""
        x = hidden.flatten(0, -2)
        routing = Routing(*self.gate(x))
        outputs = x.new_zeros((*routing.chosen.shape, x.shape[1]))
        for index, expert in enumerate(self.experts):
            token, order = (routing.chosen == index).nonzero(as_tuple=True)
            if len(token):
                outputs[token, order] = expert(x[token])
        total = torch.zeros_like(x, dtype=torch.float32)
        for place in range(routing.chosen.shape[1]):
            total += routing.weights[:, place, None].float() * outputs[:, place].float()
        out = total.to(x.dtype)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out = functional.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x) + out
        return out.view(hidden.shape)


class SharedPart(nn.Module):
    """What a mixture computes without the experts that its router chooses: the shared expert's output, or zeros."""

    def __init__(self, block: SeparateExperts):
        super().__init__()
        self.gate = block.gate
        self.shared_expert, self.shared_expert_gate = block.shared_expert, block.shared_expert_gate

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden [..., hidden_size] to outputs of the same shape."""
        if self.shared_expert is None or self.shared_expert_gate is None:
            return torch.zeros_like(hidden)
        return functional.sigmoid(self.shared_expert_gate(hidden)) * self.shared_expert(hidden)


class _Alias(nn.Module):
    """Calls a module that is registered elsewhere, under the name of its files."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module = (module,)  # in a tuple, so that its parameters have one name

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden as the module does."""
        return self._module[0](hidden)


def separate_experts(model: Any, shape: ModelShape) -> None:
    """Replace the mixtures of a transformers model, in place, by `SeparateExperts` of the names in the files."""
    if shape.experts is None:
        return
    for layer in model.model.layers:
        block = layer.mlp if hasattr(layer, "mlp") else layer.get_submodule(shape.experts.block)
        replace_block(layer, shape.experts, SeparateExperts(block, shape.experts))


def replace_block(layer: Any, names: Experts, block: nn.Module) -> None:
    """Put another module in the place of a decoder layer's mixture."""
    layer.add_module(names.block, block)
    if names.block != "mlp" and hasattr(layer, "mlp"):  # the name by which transformers calls it
        layer.mlp = _Alias(block)
