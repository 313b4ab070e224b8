"""Which checkpoint tensors reached a layer: vLLM itself does not miss those that never come."""

from collections.abc import Callable
from typing import Any

import torch

from infoquant_vllm.format import FormatError, check_values

Shard = str | int | None


class LoadTracker:
    """Records, per parameter and shard of one layer, that a checkpoint tensor arrived and is sane.

    `sources` names the checkpoint's module behind every shard ({None: name} where nothing is fused).
    """

    def __init__(self, sources: dict[Shard, str]):
        self.sources = sources
        self.expected: list[tuple[str, Shard]] = []
        self.arrived: set[tuple[str, Shard]] = set()

    def track(
        self, name: str, loader: Callable[..., None], shared: bool = False, largest_code: int | None = None
    ) -> Callable[..., None]:
        """Wrap a weight loader of parameter `name`; of a `shared` one all shards must be equal.

        Before vLLM reloads weights it counts their elements, on device meta; shared ones must count once.
        """
        self.expected += [(name, shard) for shard in self.sources]

        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            shard: Shard = next(iter((*args, *kwargs.values())), None)
            if param.is_meta:
                self._expect_again()
                if not shared or shard == next(iter(self.sources)):
                    loader(param, loaded_weight, *args, **kwargs)
                return
            source = f"{self.sources[shard]}.{name}"
            check_values(loaded_weight, source, "checkpoint", largest_code)
            before = param.data.clone() if shared and any(seen == name for seen, _ in self.arrived) else None
            loader(param, loaded_weight, *args, **kwargs)
            if before is not None and not torch.equal(before, param.data):
                raise FormatError(
                    f"{source} differs from that of {next(iter(self.sources.values()))}: "
                    "linears that vLLM fuses read one input and must transform and clip it alike"
                )
            self.arrived.add((name, shard))

        return load

    def _expect_again(self) -> None:
        if len(self.arrived) == len(self.expected):
            self.arrived.clear()

    def require_all(self) -> None:
        """Raise FormatError naming the first tensor that never came."""
        missing = [key for key in self.expected if key not in self.arrived]
        if missing:
            name, shard = missing[0]
            raise FormatError(
                f"tensor {self.sources[shard]}.{name} is missing from the checkpoint "
                f"({len(missing)} of {len(self.expected)} of this layer); quantise or copy the model again"
            )
