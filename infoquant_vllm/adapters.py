"""Serve LoRA adapters that `infoquant lora` turned into the checkpoint's basis; refuse all others by name.

vLLM wraps each linear: it calls the linear's method for an input x, and adds B A x to the output. Both are in the
checkpoint's basis, so an adapter in that of the source would be served without an error, and wrong. vLLM passes the
names of an adapter's tensors to `hf_to_vllm_mapper` of the model, an attribute that model classes define. The model
that is built here gets one of its own, which takes no other names than those of turned adapters.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.models import supports_lora
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from infoquant_vllm.format import FUSED, SITES, FormatError, source_name

if TYPE_CHECKING:
    from vllm.config.lora import LoRAConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

LINEARS = {name.rpartition(".")[2] for name in (*FUSED, *(linear for site in SITES.values() for linear in site))}
"""Names of linears that take adapters: those of the checkpoint, and those that vLLM makes of several."""


@dataclass
class TurnedNames(WeightsMapper):
    """Rename the tensors of a turned adapter as the model class renames those of any; FormatError for other names."""

    fingerprint: str = ""

    def map_name(self, key: str) -> str | None:
        """Return vLLM's name of a tensor."""
        return super().map_name(source_name(key, self.fingerprint))


@dataclass
class ModelNames(WeightsMapper):
    """Rename a checkpoint's tensors as the model class does, and leave those of adapters to `TurnedNames`."""

    fingerprint: str = ""

    def get_rename_mapper(self) -> WeightsMapper:
        """Return the mapper for names of adapters."""
        return TurnedNames(**vars(super().get_rename_mapper()))


class AdapterGuard:
    """Refuses adapters of other bases at a model that is under construction."""

    def __init__(self, config: "QuantizationConfig", fingerprint: str):
        """Wait for the model that `config` quantizes, which vLLM passes to no quantization method.

        PyTorch calls the hook whenever a module becomes part of another. The hook stays after loading, since vLLM wraps
        the linears later.
        """
        self._config, self._fingerprint, self.is_set = config, fingerprint, False
        self._hook = register_module_module_registration_hook(self._registered)

    def check(self) -> None:
        """Raise FormatError where no model came: vLLM would serve any adapter. Called when all layers are loaded."""
        if not self.is_set:
            self._hook.remove()
            raise FormatError("LoRA adapters are not served, the class of the model is not one that takes adapters")

    def _registered(self, module: Any, name: str, submodule: torch.nn.Module | None) -> None:
        if isinstance(submodule, BaseLinearLayerWithLoRA):
            _add_empty_slot(submodule)
        elif not self.is_set and getattr(module, "quant_config", None) is self._config and supports_lora(module):
            model: Any = module
            names = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
            model.hf_to_vllm_mapper = ModelNames(**vars(names), fingerprint=self._fingerprint)
            self.is_set = True


def _add_empty_slot(layer: Any) -> None:
    """Append a slot to a layer on CPUs that never holds an adapter.

    For tokens without an adapter vLLM has the slot -1. The PyTorch operations of 0.32 index the slots by that, so such
    tokens would get the last adapter (vllm-project/vllm#48421); those of 0.33 leave them out.
    """
    has_own_slots_alone = len(layer.lora_a_stacked[0]) == layer.lora_config.max_loras
    if current_platform.is_cpu() and has_own_slots_alone:
        for name in ("lora_a_stacked", "lora_b_stacked"):
            stacked = [torch.cat((slots, torch.zeros_like(slots[:1]))) for slots in getattr(layer, name)]
            setattr(layer, name, tuple(stacked))


def restrict_to_linears(config: "LoRAConfig") -> None:
    """Let vLLM make room for adapters at linears only; raise FormatError where it was told to elsewhere.

    Adapters of the vocabulary would need it in the basis of the source and unquantized.
    """
    if config.target_modules is None:
        config.target_modules = sorted(LINEARS)
        return
    others = sorted({name for name in config.target_modules if name.rpartition(".")[2] not in LINEARS})
    if others:
        raise FormatError(f"--lora-target-modules {others[0]} is not served, only {', '.join(sorted(LINEARS))} are")
