"""Compare the choices of routers: which experts a quantized model and its source send the same tokens to."""

import re
from types import TracebackType
from typing import Any, Self

import torch

from offline.model.architectures import CausalLM

LAYER = re.compile(r"\blayers\.(\d+)\.")


class RecordedRouting:
    """Record the experts that each layer's router chooses, while a model runs within a `with` block.

    Layers without a router have no choices, and without a model nothing is recorded.
    """

    def __init__(self, model: CausalLM | None):
        self._model, self._chosen = model, dict[int, list[torch.Tensor]]()

    def __enter__(self) -> Self:
        """Start recording."""
        modules = () if self._model is None else self._model.model.named_modules()
        routers = {name: module for name, module in modules if type(module).__name__.endswith("Router")}
        found = {int(layer[1]): routers[name] for name in routers if (layer := LAYER.search(name))}
        self._handles = [
            router.register_forward_hook(lambda _, args, out, layer=layer: self._keep(layer, out))
            for layer, router in found.items()
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stop recording."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, layer: int, routing: Any) -> None:
        chosen = next(part for part in routing if not part.is_floating_point())  # classes have it in other places
        self._chosen.setdefault(layer, []).append(chosen)

    def agreement(self, other: "RecordedRouting") -> dict[int, float]:
        """Return by layer the share of the chosen experts that the other model chose too; forget both.

        Layers that only one of them ran have none: a reference may answer from memory.
        """
        ours, theirs = self._chosen, other._chosen
        self._chosen, other._chosen = {}, {}
        pairs = {layer: (torch.cat(ours[layer]), torch.cat(theirs[layer])) for layer in ours.keys() & theirs.keys()}
        return {
            layer: (a[:, :, None] == b[:, None]).any(2).float().mean().item() for layer, (a, b) in sorted(pairs.items())
        }
