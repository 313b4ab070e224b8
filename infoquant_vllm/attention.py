"""The attention backend over the quantised KV cache: spec, metadata and implementation."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVQuantMode

from infoquant_vllm.format import cell_bytes
from infoquant_vllm.ops.table import kernel


class KV4Backend(AttentionBackend):
    """Attention over 4-bit codes."""

    num_bits: ClassVar[tuple[int, int]] = (4, 4)
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "int4_per_token_head"]

    @staticmethod
    def get_name() -> str:
        """The name vLLM keeps for backends from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["KVImpl"]:
        """The implementation."""
        return KVImpl

    @staticmethod
    def get_builder_cls() -> type["KVMetadataBuilder"]:
        """The metadata builder."""
        return KVMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any multiple of 16 tokens."""
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layers, blocks, kv-heads, tokens, bytes."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are a mask."""
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Let vLLM reserve the bytes that a cell takes."""
        if spec.state_content_bytes is not None:
            return spec
        mode = KVQuantMode.INT4_PER_TOKEN_HEAD if cls.num_bits == (4, 4) else KVQuantMode.INT8_PER_TOKEN_HEAD
        content = cell_bytes(spec.head_size, cls.num_bits)
        return replace(spec, dtype=torch.uint8, state_content_bytes=content, kv_quant_mode=mode)


class KV8Backend(KV4Backend):
    """The same with 8-bit codes."""

    num_bits: ClassVar[tuple[int, int]] = (8, 8)


class K8V4Backend(KV4Backend):
    """8-bit keys, 4-bit values."""

    num_bits: ClassVar[tuple[int, int]] = (8, 4)


class K4V8Backend(KV4Backend):
    """4-bit keys, 8-bit values."""

    num_bits: ClassVar[tuple[int, int]] = (4, 8)


BACKENDS: dict[tuple[int, int], type[KV4Backend]] = {
    backend.num_bits: backend for backend in (KV4Backend, KV8Backend, K8V4Backend, K4V8Backend)
}
"""By the bits of keys and of values. Classes, since vLLM asks them for the size of a cell."""


@dataclass
class KVMetadata(AttentionMetadata):
    """A batch: sequence i has queries query_starts[i] .. query_starts[i + 1], its last tokens."""

    query_starts: torch.Tensor  # [sequences + 1] int32
    seq_lens: torch.Tensor  # [sequences] int32
    block_table: torch.Tensor  # [sequences, blocks] int32
    num_actual_tokens: int


class KVMetadataBuilder(AttentionMetadataBuilder[KVMetadata]):
    """Makes a batch's metadata, once for all layers."""

    # The metadata are vLLM's own persistent tensors, and launches hang on shapes alone: any batch can be captured.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KVMetadata:
        """Metadata of a batch; raises NotImplementedError for one that is not causal."""
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("infoquant: attention that is not causal is not served")
        return KVMetadata(
            query_starts=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
        )


class KVImpl(AttentionImpl[KVMetadata]):
    """Stores keys and values as codes, and attends over the codes only, the current chunk's too.

    A prompt's results therefore do not depend on how it is cut into chunks or what was cached.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        num_bits: tuple[int, int] = (4, 4),
        key_transform: str = "none",
    ):
        if alibi_slopes is not None or attn_type != AttentionType.DECODER:
            raise NotImplementedError("infoquant: alibi and encoder attention are not served")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.capped = {"soft_cap": float(logits_soft_cap)} if logits_soft_cap else {}  # which not all kernels take
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.num_bits, self.hadamard = num_bits, key_transform == "hadamard"
        self.cell_bytes = cell_bytes(head_size, num_bits)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store key, value [tokens, kv_heads, head_size] at slot_mapping [tokens] int64."""
        if kv_cache.numel() == 0:  # the run that measures memory has no cache yet
            return
        store = kernel("kv_store", key.device.type)
        ranges = layer.key_clip, layer.value_clip, getattr(layer, "key_offset", None)
        store(key, value, kv_cache, slot_mapping, *ranges, self.hadamard, self.num_bits)

    def forward(  # type: ignore[override]
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with query [tokens, heads, head_size] and write output of the same shape."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("infoquant: a quantised attention output is not served")
        if attn_metadata is None:  # the run that measures memory
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        kernel("kv_attention", query.device.type)(
            query[:tokens],
            kv_cache,
            attn_metadata.query_starts,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.hadamard,
            self.scale,
            self.sliding_window,
            self.num_bits,
            output[:tokens],
            **self.capped,
        )
        return output
