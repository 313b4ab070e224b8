"""Track which checkpoint tensors reached a layer: vLLM does not notice missing ones."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger

from infoquant_vllm.dummy_weights import fill_dummy_weights
from infoquant_vllm.format import FormatError, check_values

logger = init_logger("vllm.infoquant")

Shard = str | int | tuple[int, str] | None
"""Part of a fused parameter; of stacked experts, the expert and vLLM's name of its linear."""


def loads_dummy_weights() -> bool:
    """Return whether the model under construction is served without weights (`--load-format dummy`)."""
    return get_current_vllm_config().load_config.load_format == "dummy"


def what_a_reload_leaves() -> str | None:
    """Return what of the model under construction `reload_weights` would wrongly keep, None for nothing."""
    config = get_current_vllm_config()
    if config.model_config is not None and config.model_config.runner_type == "pooling":
        return "the projection of the previous checkpoint, and embeddings would be wrong"
    if config.lora_config is not None:
        return "the LoRA adapters that were turned for the previous checkpoint, and their answers would be wrong"
    return None


class LoadTracker:
    """Record, per parameter and shard of one layer, that a checkpoint tensor arrived and holds valid values.

    `sources` names the checkpoint's module behind every shard ({None: name} where nothing is fused).
    """

    def __init__(self, sources: dict[Shard, str]):
        self.sources = sources
        self.expected: list[tuple[str, Shard]] = []
        self.arrived: set[tuple[str, Shard]] = set()
        self.is_dummy = loads_dummy_weights()
        self.kept_by_reload = what_a_reload_leaves()

    def track(
        self, name: str, loader: Callable[..., None], shared: bool = False, largest_code: int | None = None
    ) -> Callable[..., None]:
        """Wrap the weight loader of parameter `name`; all shards of a `shared` one must be equal.

        Before vLLM reloads weights it counts their elements, on the meta device; shared ones must count once.
        """
        self.expected += [(name, shard) for shard in self.sources]

        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            shard: Shard = next(iter((*args, *kwargs.values())), None)
            if param.is_meta:
                self._expect_again()
                if self.kept_by_reload is not None:
                    raise FormatError(
                        f"reload_weights is not served here: vLLM would keep {self.kept_by_reload}; restart the server"
                    )
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
                    "linears that vLLM fuses read one input and must transform and clip it the same way"
                )
            self.arrived.add((name, shard))

        return load

    def _expect_again(self) -> None:
        if len(self.arrived) == len(self.expected):
            self.arrived.clear()

    def finish(self, layer: torch.nn.Module, num_bits: int | None = None, prefix: str = "") -> None:
        """Raise FormatError naming the first missing tensor; with `--load-format dummy` fill them once.

        num_bits: bits of the layer's weight codes
        prefix: of the parameters' names in the layer
        """
        if self.is_dummy and not self.arrived:
            logger.warning_once(
                "infoquant: --load-format dummy: weights, scales and rotations are random; "
                "speed and memory are those of a real checkpoint, the answers mean nothing"
            )
            tensors = {name: getattr(layer, f"{prefix}{name}").data for name, _ in self.expected}
            fill_dummy_weights(tensors, next(iter(self.sources.values())), num_bits)
            self.arrived.update(self.expected)
        self.is_dummy = False  # a tensor that a reload does not bring is missing
        self._require_all()

    def _require_all(self) -> None:
        missing = [key for key in self.expected if key not in self.arrived]
        if missing:
            name, shard = missing[0]
            raise FormatError(
                f"tensor {self.sources[shard]}.{name} is missing from the checkpoint "
                f"({len(missing)} of {len(self.expected)} of this layer); quantize or copy the model again"
            )
