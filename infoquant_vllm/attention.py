"""The attention backend over the quantized KV cache: spec, metadata and implementation."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
    max_decode_query_len,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec, KVQuantMode
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from infoquant_vllm.format import kv_bytes_per_token_head
from infoquant_vllm.ops.table import has_kernel, kernel


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
        content = kv_bytes_per_token_head(spec.head_size, cls.num_bits)
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
    """A batch: sequence i has queries query_starts[i] .. query_starts[i + 1], its last tokens.

    The first num_decodes sequences, of num_decode_tokens queries, are for the kernel that serves a few queries each.
    """

    query_starts: torch.Tensor  # [sequences + 1] int32
    seq_lens: torch.Tensor  # [sequences] int32
    block_table: torch.Tensor  # [sequences, blocks] int32
    num_actual_tokens: int
    num_decodes: int = 0
    num_decode_tokens: int = 0


class KVMetadataBuilder(AttentionMetadataBuilder[KVMetadata]):
    """Makes a batch's metadata, once for all layers."""

    # A captured graph has no prompts: those need other launches. The metadata are vLLM's own persistent tensors and
    # launches depend on shapes alone, so a graph of decoding sequences serves every batch of them.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if has_kernel("kv_decode", device.type):  # else batches stay in their order and one kernel serves them whole
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> int:
        """Return how many queries vLLM verifies at once; a captured graph reads their number from the device."""
        return max_decode_query_len(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KVMetadata:
        """Metadata of a batch; raises NotImplementedError for one that is not causal."""
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("infoquant: attention that is not causal is not served")
        decodes = tokens = 0
        if self.reorder_batch_threshold is not None:
            decodes, _, tokens, _ = split_decodes_and_prefills(common_attn_metadata, self.reorder_batch_threshold)
        return KVMetadata(
            query_starts=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
            num_decodes=decodes,
            num_decode_tokens=tokens,
        )


class Decoding(NamedTuple):
    """What an engine's decoding batches are bounded by: sequences, queries of each, tokens of each."""

    sequences: int
    queries: int
    context: int


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
        self.kv_bytes_per_token_head = kv_bytes_per_token_head(head_size, num_bits)
        self.decoding = _decoding() if has_kernel("kv_decode", current_platform.device_type) else None
        self.scratch_shapes: tuple[tuple[int, ...], ...] | None = None

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
        ranges = layer.key_clip_ratio, layer.value_clip_ratio, getattr(layer, "key_mean", None)
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
            raise NotImplementedError("infoquant: a quantized attention output is not served")
        if attn_metadata is None:  # the run that measures memory
            if self.decoding is not None:
                self._scratch(query.device)
            return output.zero_()
        self._attend(query, kv_cache, attn_metadata, output)
        return output

    def _attend(self, query: torch.Tensor, kv_cache: torch.Tensor, batch: KVMetadata, output: torch.Tensor) -> None:
        device, tokens, sequences = query.device, batch.num_actual_tokens, batch.num_decodes
        of_layer = self.hadamard, self.scale, self.sliding_window, self.num_bits
        if sequences > 0:
            assert self.decoding is not None
            rows = slice(0, batch.num_decode_tokens)
            kernel("kv_decode", device.type)(
                query[rows],
                kv_cache,
                batch.query_starts[: sequences + 1],
                batch.seq_lens[:sequences],
                batch.block_table[:sequences],
                *of_layer,
                output[rows],
                self.decoding.queries,
                self._scratch(device),
                **self.capped,
            )
        if batch.num_decode_tokens < tokens:
            rows = slice(batch.num_decode_tokens, tokens)
            kernel("kv_attention", device.type)(
                query[rows],
                kv_cache,
                batch.query_starts[sequences:],
                batch.seq_lens[sequences:],
                batch.block_table[sequences:],
                *of_layer,
                output[rows],
                **self.capped,
            )

    def _scratch(self, device: torch.device) -> list[torch.Tensor]:
        """Return the decode kernel's scratch: one for all layers, claimed before vLLM sizes the cache."""
        if self.scratch_shapes is None:
            heads = self.num_heads, self.num_kv_heads, self.head_size, self.sliding_window
            assert self.decoding is not None
            self.scratch_shapes = kernel("decode_scratch", device.type)(*heads, *self.decoding, device)
        if is_workspace_manager_initialized():
            shapes = [(shape, torch.float32) for shape in self.scratch_shapes]
            return current_workspace_manager().get_simultaneous(*shapes)
        return [torch.empty(shape, device=device) for shape in self.scratch_shapes]


def _decoding() -> Decoding:
    config = get_current_vllm_config()
    sequences, context = config.scheduler_config.max_num_seqs, config.model_config.max_model_len
    return Decoding(sequences, max_decode_query_len(config), context)
