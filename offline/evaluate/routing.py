"""Compare the choices of routers: which experts a quantized model and its source send the same tokens to."""

from typing import Any

import torch

from offline.model.architectures import CausalLM


class RecordedRouting:
    """Record the experts that each layer's router chooses, while a model runs; layers without a router have none."""

    def __init__(self, model: CausalLM):
        self._chosen: dict[int, list[torch.Tensor]] = {}
        for index, layer in enumerate(model.model.layers):
            routers = [module for module in layer.modules() if type(module).__name__.endswith("Router")]
            for router in routers:
                router.register_forward_hook(lambda _, args, out, index=index: self._keep(index, out))

    def _keep(self, layer: int, routing: Any) -> None:
        self._chosen.setdefault(layer, []).append(routing[2])

    def agreement(self, other: "RecordedRouting") -> dict[int, float]:
        """Return by layer the share of the chosen experts that the other model chose too; forget both."""
        ours, theirs = self._chosen, other._chosen
        self._chosen, other._chosen = {}, {}
        pairs = {layer: (torch.cat(chosen), torch.cat(theirs[layer])) for layer, chosen in ours.items()}
        return {layer: (a[:, :, None] == b[:, None]).any(2).float().mean().item() for layer, (a, b) in pairs.items()}
