"""Which method serves which layer of a quantized model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from infoquant_vllm.format import (
    INDEX_FILE,
    QUANT_METHOD,
    Checkpoint,
    FormatError,
    QuantizationConfigData,
    parse_config,
)
from infoquant_vllm.loading import loads_dummy_weights
from infoquant_vllm.ops.table import forced_family
from infoquant_vllm.summary import Summary

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper


class InfoQuantConfig(QuantizationConfig):
    """`quantization_config` of a checkpoint, as vLLM asks for it."""

    def __init__(self, data: QuantizationConfigData | None = None):
        super().__init__()
        forced_family()  # refuses a word that names none, before any layer is built
        if data is None:  # vLLM found no quantization_config, but --quantization infoquant was given
            raise FormatError(
                "the model is not quantized: its config.json has no quantization_config; "
                "run `infoquant quantize MODEL OUTPUT` first and serve OUTPUT"
            )
        self.data = data
        self.summary = Summary()
        self.folder_without_weights: Path | None = None
        self.doors_checked = False
        self.rotation_back: torch.Tensor | None = None  # kept by lm_head until the embedding's comes anew

    def get_name(self) -> str:  # type: ignore[override]
        """The method's name."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Model dtypes served."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """First GPU generation with int8 tensor cores."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the config is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "InfoQuantConfig":
        """Validate `quantization_config`; raises FormatError naming every wrong field."""
        return cls(parse_config(config, "config.json: quantization_config"))

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Compare a local folder's files with its config before anything is loaded.

        vLLM does not pass the load format here. A folder without weights is refused later, when its first layer is
        built.
        """
        folder = Path(model_name)
        if not folder.is_dir():
            return
        if (folder / INDEX_FILE).exists() or any(folder.glob("*.safetensors")):
            Checkpoint(folder).check_norms()
        else:
            self.folder_without_weights = folder

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename targets as the model renames its modules (stacked names are found by their parts)."""
        renames = type(hf_to_vllm_mapper)(
            orig_to_new_regex=hf_to_vllm_mapper.orig_to_new_regex,
            orig_to_new_substr=hf_to_vllm_mapper.orig_to_new_substr,
            orig_to_new_prefix=hf_to_vllm_mapper.orig_to_new_prefix,
            orig_to_new_suffix=hf_to_vllm_mapper.orig_to_new_suffix,
        )
        groups = {
            name: group.model_copy(update={"targets": renames.apply_list(group.targets)})
            for name, group in self.data.config_groups.items()
        }
        update = {"config_groups": groups, "ignore": renames.apply_list(self.data.ignore)}
        self.data = QuantizationConfigData.model_validate(self.data.model_copy(update=update).model_dump())

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for a layer; raises FormatError for one that neither a target nor `ignore` names."""
        from vllm.model_executor.layers.attention import Attention, MLAAttention
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from infoquant_vllm.arithmetic import use_own_arithmetic
        from infoquant_vllm.kv_cache import InfoQuantKVCacheMethod

        _refuse_adapters(prefix)
        _refuse_other_classes()
        if self.folder_without_weights is not None and not loads_dummy_weights():
            raise FormatError(
                f"{self.folder_without_weights}: holds no weights ({INDEX_FILE} is missing); copy the checkpoint "
                "again, or pass --load-format dummy to time its shape with made-up ones"
            )
        self._check_doors()
        use_own_arithmetic()  # the embedding comes here before the layers choose their operations
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(isinstance(layer, ParallelLMHead), prefix)
        if isinstance(layer, Attention):
            kv_cache = self.data.kv_cache
            return None if kv_cache is None else InfoQuantKVCacheMethod(self, kv_cache)
        if isinstance(layer, MLAAttention | RoutedExperts):
            raise FormatError(f"{prefix}: {type(layer).__name__} is not served by this release")
        return None

    def _check_doors(self) -> None:
        from infoquant_vllm.doors import check_doors

        if not self.doors_checked:
            check_doors(self.data, get_current_vllm_config())
            self.doors_checked = True

    def sources(self, prefix: str) -> list[str]:
        """The checkpoint's linears behind a vLLM linear: its shards where vLLM fuses them."""
        parent, _, name = prefix.rpartition(".")
        shards = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{shard}" if parent else shard for shard in shards]

    def _vocabulary_method(self, is_head: bool, prefix: str) -> QuantizeMethodBase | None:
        from infoquant_vllm.embedding import VocabularyMethod

        rotated, model = self.data.online_r1, get_current_vllm_config().model_config
        tied = rotated or (model is not None and getattr(model.hf_text_config, "tie_word_embeddings", False))
        quantized = self.data.lm_head_bits is not None and (is_head or tied)
        return VocabularyMethod(self, prefix, rotated, quantized) if rotated or quantized else None

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        from infoquant_vllm.linear import InfoQuantLinearMethod

        sources = self.sources(prefix)
        schemes = [self.data.scheme(source) for source in sources]
        for source, scheme in zip(sources, schemes, strict=True):
            if scheme != schemes[0]:
                raise FormatError(f"{source} and {sources[0]} are one linear in vLLM and need equal schemes")
        if schemes[0] is None:
            return UnquantizedLinearMethod()
        return InfoQuantLinearMethod(self, schemes[0], prefix)


def _refuse_adapters(prefix: str) -> None:
    if get_current_vllm_config().lora_config is not None:
        raise FormatError(
            f"{prefix}: LoRA adapters are not served on a quantized model, whose weights are in a rotated basis that "
            "adapters were not trained in; merge the adapter into the source model and quantize that"
        )


def _refuse_other_classes() -> None:
    model = get_current_vllm_config().model_config
    if model is not None and model.using_transformers_backend():
        raise FormatError(
            "--model-impl transformers is not served: a quantized model needs vLLM's own model classes, whose fused "
            "linears its tensors are made for; leave --model-impl at auto"
        )
