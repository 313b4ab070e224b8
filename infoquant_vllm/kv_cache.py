"""Give an attention layer the quantized KV cache."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from infoquant_vllm.attention import ATTENTION_BACKENDS
from infoquant_vllm.format import FormatError, KVCacheArgs
from infoquant_vllm.kernels.dispatch import backend
from infoquant_vllm.kernels.operands import KVScheme
from infoquant_vllm.loading import LoadTracker
from infoquant_vllm.summary import Summary

SERVED_CACHE_DTYPES = ("auto", "int4_per_token_head")


class InfoQuantKVCacheMethod(BaseKVCacheMethod):
    """Replace a decoder layer's attention backend by one over 4-bit or 8-bit codes."""

    def __init__(self, quant_config: QuantizationConfig, args: KVCacheArgs, summary: Summary):
        super().__init__(quant_config)
        self.args, self.summary = args, summary

    def create_weights(self, layer: Any) -> None:
        """Register the cache's tensors and replace the backend, at the end of `Attention.__init__`."""
        super().create_weights(layer)
        _refuse_unserved_features(layer)
        _check_window(layer)
        try:
            backend(current_platform.device_type).check_head_size(layer.head_size)
        except NotImplementedError as error:
            raise FormatError(f"{layer.layer_name}: {error}") from None
        layer.infoquant_tracker = LoadTracker({None: layer.layer_name})
        sizes: dict[str, tuple[int, ...]] = {"key_clip_ratio": (2,), "value_clip_ratio": (2,)}
        sizes |= {"key_mean": (layer.head_size,)} if self.args.key_mean else {}
        sizes |= {"key_feedback": (layer.head_size, layer.head_size)} if self.args.key_feedback else {}
        for name, size in sizes.items():
            data = torch.empty(layer.num_kv_heads, *size, dtype=torch.float32)
            param = torch.nn.Parameter(data, requires_grad=False)
            set_weight_attrs(param, {"weight_loader": layer.infoquant_tracker.track(name, _load_kv_heads)})
            layer.register_parameter(name, param)
        layer.attn_backend = ATTENTION_BACKENDS[self.args.num_bits]
        layer.backend = AttentionBackendEnum.CUSTOM
        layer.impl = layer.attn_backend.get_impl_cls()(
            layer.num_heads,
            layer.head_size,
            layer.impl.scale,
            layer.num_kv_heads,
            sliding_window=layer.sliding_window,
            kv_cache_dtype=layer.kv_cache_dtype,
            logits_soft_cap=getattr(layer.impl, "logits_soft_cap", None),
            attn_type=layer.attn_type,
            kv_sharing_target_layer_name=layer.kv_sharing_target_layer_name,
            scheme=KVScheme(self.args.num_bits, self.args.key_transform == "hadamard"),
        )
        self.summary.expect()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse missing tensors."""
        super().process_weights_after_loading(layer)
        layer.infoquant_tracker.finish(layer)
        keys, values = self.args.num_bits
        codes = f"KV{keys}" if keys == values else f"K{keys}V{values}"
        kernels = backend(layer.key_clip_ratio.device.type).name
        self.summary.cache(f"{codes} ({kernels})", layer.impl.kv_bytes_per_token_head, 4 * layer.head_size)


def _load_kv_heads(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
    """Load this rank's kv-heads out of all; ranks beyond their number share them."""
    all_heads, heads = len(loaded_weight), len(param)
    start = get_tensor_model_parallel_rank() * all_heads // get_tensor_model_parallel_world_size()
    param.data.copy_(loaded_weight[start : start + heads])


def _refuse_unserved_features(layer: Any) -> None:
    impl: Any = layer.impl
    refused = {
        f"{type(layer).__name__} layers": type(layer) is not Attention,
        f"attention type {layer.attn_type}": layer.attn_type != AttentionType.DECODER,
        f"kv cache dtype {layer.kv_cache_dtype}": layer.kv_cache_dtype not in SERVED_CACHE_DTYPES,
        "alibi": getattr(impl, "alibi_slopes", None) is not None or layer.use_alibi_sqrt,
        "attention sinks": layer.has_sink,
        "bidirectional prefixes": layer.use_mm_prefix,
        "values of another head size than keys": layer.head_size_v != layer.head_size,
    }
    for feature, present in refused.items():
        if present:
            raise FormatError(f"{layer.layer_name}: {feature}: not served with a quantized KV cache")


def _check_window(layer: Any) -> None:
    """Refuse a class of vLLM that does not apply the windows of single layers; that of Qwen ignores them."""
    model = get_current_vllm_config().model_config
    config = None if model is None else model.hf_text_config
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return
    is_local = kinds[extract_layer_index(layer.layer_name)] == "sliding_attention"
    expected = getattr(config, "sliding_window", None) if is_local else None
    if layer.sliding_window != expected:
        raise FormatError(
            f"{layer.layer_name}: vLLM's class attends over a window of {layer.sliding_window} tokens, config.json "
            f"asks for {expected} (None: all); pass --model-impl transformers"
        )
