"""Choose the method that serves each layer of a quantized model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from infoquant_vllm.format import (
    FUSED,
    INDEX_FILE,
    QUANT_METHOD,
    Checkpoint,
    FormatError,
    QuantizationConfigData,
    parse_config,
)
from infoquant_vllm.kernels.dispatch import MIN_CAPABILITY, forced_kernels
from infoquant_vllm.summary import Summary

if TYPE_CHECKING:
    from vllm.config import LoRAConfig, ModelConfig
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.models.utils import WeightsMapper


class InfoQuantConfig(QuantizationConfig):
    """Hold the `quantization_config` of a checkpoint and answer vLLM's questions about it."""

    def __init__(self, data: QuantizationConfigData | None = None):
        super().__init__()
        forced_kernels()  # refuse an unknown INFOQUANT_KERNELS before any layer is built
        if data is None:  # vLLM found no quantization_config, but --quantization infoquant was given
            raise FormatError(
                "the model is not quantized: its config.json has no quantization_config; "
                "run `infoquant quantize MODEL OUTPUT` first and serve OUTPUT"
            )
        self.data = data
        self.summary = Summary()
        self.folder_without_weights: Path | None = None
        self.started = False

    def get_name(self) -> str:  # type: ignore[override]
        """Return the method's name."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the model dtypes that are served."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the first compute capability with int8 tensor cores, times ten."""
        return MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return none: the config is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "InfoQuantConfig":
        """Validate `quantization_config`; raises FormatError naming every wrong field."""
        return cls(parse_config(config, "config.json: quantization_config"))

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Compare a local folder's files with its config before anything is loaded.

        vLLM does not pass the load format here, so a folder without weights is refused later (`_start_model`).
        """
        folder = Path(model_name)
        if not folder.is_dir():
            return
        if (folder / INDEX_FILE).exists() or any(folder.glob("*.safetensors")):
            Checkpoint(folder).check_unquantized()
        else:
            self.folder_without_weights = folder

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename targets as the model class renames its modules; fused linears are found by their parts' names."""
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
        """Return the method for a layer; raises FormatError for one that neither a target nor `ignore` names."""
        from vllm.model_executor.layers.attention import Attention, MLAAttention
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from infoquant_vllm.kv_cache import InfoQuantKVCacheMethod

        self._start_model()
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(isinstance(layer, ParallelLMHead), prefix)
        if isinstance(layer, Attention):
            kv_cache = self.data.kv_cache
            return None if kv_cache is None else InfoQuantKVCacheMethod(self, kv_cache, self.summary)
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, MLAAttention):
            raise FormatError(f"{prefix}: {type(layer).__name__} is not served by this release")
        return None

    def _start_model(self) -> None:
        """Check the engine's options and select this package's CPU operations, before the first layer is built.

        The first `get_quant_method` is the only call of a config that vLLM makes in the process that builds the model
        and with the engine's config set: `from_config` and `maybe_update_config` run in the front end, without it,
        and `register` runs for every model of a process that has the plugin installed. The embedding comes here before
        the first norm, activation or RoPE chooses its operation.
        """
        from infoquant_vllm.cpu_ops import use_cpu_ops
        from infoquant_vllm.engine_options import check_engine_options

        if not self.started:
            vllm_config = get_current_vllm_config()
            check_engine_options(self.data, vllm_config, self.folder_without_weights)
            use_cpu_ops(vllm_config.compilation_config)
            if vllm_config.lora_config is not None:
                self._serve_adapters(vllm_config.lora_config, vllm_config.model_config)
            self.started = True

    def _serve_adapters(self, options: "LoRAConfig", model: "ModelConfig") -> None:
        from infoquant_vllm.adapters import AdapterGuard, restrict_to_linears
        from infoquant_vllm.engine_options import adapter_fingerprint

        fingerprint = adapter_fingerprint(model)
        restrict_to_linears(options)
        self.summary.adapters = AdapterGuard(self, fingerprint)

    def _sources(self, prefix: str) -> list[str]:
        """Return the checkpoint's linears behind a vLLM linear: its shards where vLLM fuses them.

        vLLM's `packed_modules_mapping` does not say that for a class whose source has fused linears (Phi-3).
        """
        block, _, name = prefix.rpartition(".")  # of attention, of an MLP, or of a shared expert
        for fused, shards in FUSED.items():
            if name == fused.rpartition(".")[2]:
                return [f"{block}.{shard.rpartition('.')[2]}" for shard in shards]
        return [prefix]

    def _embedding_method(self, is_head: bool, prefix: str) -> QuantizeMethodBase | None:
        from infoquant_vllm.embedding import InfoQuantEmbeddingMethod

        rotated, model = self.data.online_r1, get_current_vllm_config().model_config
        tied = rotated or (model is not None and getattr(model.hf_text_config, "tie_word_embeddings", False))
        num_bits = self.data.lm_head_bits if is_head or tied else None
        if not rotated and num_bits is None:
            return None
        return InfoQuantEmbeddingMethod(prefix, rotated, num_bits, self.summary)

    def _experts_method(self, layer: "RoutedExperts", prefix: str) -> QuantizeMethodBase | None:
        from infoquant_vllm.experts import InfoQuantExpertsMethod

        model = get_current_vllm_config().model_config
        if model is not None and model.using_transformers_backend():
            raise FormatError(f"{prefix}: mixtures of experts are not served by --model-impl transformers")
        gate, up, down = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
        places = [f"{prefix}.{expert}" for expert in range(layer.moe_config.num_logical_experts)]
        schemes = [[self.data.scheme(f"{place}.{name}") for place in places for name in names]
                   for names in ((gate, up), (down,))]  # fmt: skip
        for found in schemes:
            if any(scheme != found[0] for scheme in found):
                raise FormatError(f"{prefix}: the experts of a mixture need equal schemes")
        reading, writing = schemes[0][0], schemes[1][0]
        if reading is None and writing is None:
            return None
        if reading is None or writing is None:
            raise FormatError(f"{prefix}: all linears of experts are quantized, or none")
        return InfoQuantExpertsMethod(prefix, layer, (reading, writing), self.summary)

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        from infoquant_vllm.linear import InfoQuantLinearMethod

        sources = self._sources(prefix)
        schemes = [self.data.scheme(source) for source in sources]
        for source, scheme in zip(sources, schemes, strict=True):
            if scheme != schemes[0]:
                raise FormatError(f"{source} and {sources[0]} are one linear in vLLM and need equal schemes")
        if schemes[0] is None:
            return UnquantizedLinearMethod()
        return InfoQuantLinearMethod(prefix, schemes[0], sources, self.summary)
