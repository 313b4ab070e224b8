"""Attention over the quantized KV cache: the backend, its metadata and its implementation."""

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
from infoquant_vllm.kernels.dispatch import backend
from infoquant_vllm.kernels.operands import KVCalibration, KVScheme, ScoreParams, Sequences

DEFAULT_SCHEME = KVScheme((4, 4), hadamard=False)


class InfoQuantAttentionBackend(AttentionBackend):
    """Answer vLLM's questions about attention over 4-bit keys and values."""

    num_bits: ClassVar[tuple[int, int]] = (4, 4)
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "int4_per_token_head"]

    @staticmethod
    def get_name() -> str:
        """Return the name that vLLM keeps for backends from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["InfoQuantAttentionImpl"]:
        """Return the implementation."""
        return InfoQuantAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["InfoQuantAttentionMetadataBuilder"]:
        """Return the metadata builder."""
        return InfoQuantAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Serve any multiple of 16 tokens."""
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layout of a cache: layers, blocks, kv-heads, tokens, bytes."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Serve windows, as a mask."""
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Let vLLM reserve the bytes of a KV entry."""
        if spec.state_content_bytes is not None:
            return spec
        mode = KVQuantMode.INT4_PER_TOKEN_HEAD if cls.num_bits == (4, 4) else KVQuantMode.INT8_PER_TOKEN_HEAD
        content = kv_bytes_per_token_head(spec.head_size, cls.num_bits)
        return replace(spec, dtype=torch.uint8, state_content_bytes=content, kv_quant_mode=mode)


class KV8AttentionBackend(InfoQuantAttentionBackend):
    """The same with 8-bit keys and values."""

    num_bits: ClassVar[tuple[int, int]] = (8, 8)


class K8V4AttentionBackend(InfoQuantAttentionBackend):
    """The same with 8-bit keys and 4-bit values."""

    num_bits: ClassVar[tuple[int, int]] = (8, 4)


class K4V8AttentionBackend(InfoQuantAttentionBackend):
    """The same with 4-bit keys and 8-bit values."""

    num_bits: ClassVar[tuple[int, int]] = (4, 8)


ATTENTION_BACKENDS: dict[tuple[int, int], type[InfoQuantAttentionBackend]] = {
    each.num_bits: each
    for each in (InfoQuantAttentionBackend, KV8AttentionBackend, K8V4AttentionBackend, K4V8AttentionBackend)
}
"""By the bits of keys and values. Classes, since vLLM asks a class for the size of a KV entry."""


@dataclass
class InfoQuantAttentionMetadata(AttentionMetadata):
    """Describe a batch.

    The first num_decodes sequences, of num_decode_tokens queries, are for the kernel that serves a few queries each.
    """

    sequences: Sequences
    num_actual_tokens: int
    num_decodes: int = 0
    num_decode_tokens: int = 0


class InfoQuantAttentionMetadataBuilder(AttentionMetadataBuilder[InfoQuantAttentionMetadata]):
    """Build a batch's metadata, once for all layers."""

    # A captured graph has no prompts: those need other launches. The metadata are vLLM's own persistent tensors and
    # launches depend on shapes alone, so a graph of decoding sequences serves every batch of them.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if backend(device.type).kv_decode is not None:  # else batches keep their order and one kernel serves them whole
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> int:
        """Return how many queries vLLM verifies at once; a captured graph reads their number from the device."""
        return max_decode_query_len(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> InfoQuantAttentionMetadata:
        """Return the metadata of a batch; raises NotImplementedError for one that is not causal."""
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("infoquant: attention that is not causal is not served")
        decodes = tokens = 0
        if self.reorder_batch_threshold is not None:
            decodes, _, tokens, _ = split_decodes_and_prefills(common_attn_metadata, self.reorder_batch_threshold)
        return InfoQuantAttentionMetadata(
            sequences=Sequences(
                query_starts=common_attn_metadata.query_start_loc,
                seq_lens=common_attn_metadata.seq_lens,
                block_table=common_attn_metadata.block_table_tensor,
            ),
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
            num_decodes=decodes,
            num_decode_tokens=tokens,
        )


class DecodeBounds(NamedTuple):
    """Bounds of an engine's decoding batches: sequences, queries of each, tokens of each."""

    sequences: int
    queries: int
    context: int


class InfoQuantAttentionImpl(AttentionImpl[InfoQuantAttentionMetadata]):
    """Store keys and values as codes, and attend over the codes only, also for the current chunk.

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
        scheme: KVScheme = DEFAULT_SCHEME,
    ):
        if alibi_slopes is not None or attn_type != AttentionType.DECODER:
            raise NotImplementedError("infoquant: alibi and encoder attention are not served")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.scheme, self.score = scheme, ScoreParams(self.scale, sliding_window, logits_soft_cap or None)
        self.kv_bytes_per_token_head = kv_bytes_per_token_head(head_size, scheme.num_bits)
        has_decode = backend(current_platform.device_type).kv_decode is not None
        self.bounds = _decode_bounds() if has_decode else None
        self.scratch_shapes: tuple[tuple[int, ...], ...] | None = None

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store key, value [tokens, kv_heads, head_size] at slot_mapping [tokens] int64."""
        if kv_cache.numel() == 0:  # the run that measures memory has no cache yet
            return
        mean, feedback = getattr(layer, "key_mean", None), getattr(layer, "key_feedback", None)
        calibration = KVCalibration(layer.key_clip_ratio, layer.value_clip_ratio, mean, feedback)
        backend(key.device.type).kv_store(key, value, kv_cache, slot_mapping, calibration, self.scheme)

    def forward(  # type: ignore[override]
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: InfoQuantAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with query [tokens, heads, head_size] and write output of the same shape."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("infoquant: a quantized attention output is not served")
        if attn_metadata is None:  # the run that measures memory
            if self.bounds is not None:
                self._scratch(query.device)
            return output.zero_()
        self._attend(query, kv_cache, attn_metadata, output)
        return output

    def _attend(
        self, query: torch.Tensor, kv_cache: torch.Tensor, batch: InfoQuantAttentionMetadata, output: torch.Tensor
    ) -> None:
        kernels, tokens, decodes = backend(query.device.type), batch.num_actual_tokens, batch.num_decodes
        query_starts, seq_lens, block_table = batch.sequences
        if decodes > 0:
            assert kernels.kv_decode is not None
            assert self.bounds is not None
            rows = slice(0, batch.num_decode_tokens)
            part = Sequences(query_starts[: decodes + 1], seq_lens[:decodes], block_table[:decodes])
            scratch = self._scratch(query.device)
            kernels.kv_decode(
                query[rows], kv_cache, part, self.score, self.scheme, output[rows], self.bounds.queries, scratch
            )
        if batch.num_decode_tokens < tokens:
            rows = slice(batch.num_decode_tokens, tokens)
            part = batch.sequences
            if decodes > 0:
                part = Sequences(query_starts[decodes:], seq_lens[decodes:], block_table[decodes:])
            kernels.kv_attention(query[rows], kv_cache, part, self.score, self.scheme, output[rows])

    def _scratch(self, device: torch.device) -> list[torch.Tensor]:
        """Return the decode kernel's scratch: one for all layers, claimed before vLLM sizes the cache."""
        if self.scratch_shapes is None:
            heads = self.num_heads, self.num_kv_heads, self.head_size, self.sliding_window
            decode_scratch = backend(device.type).decode_scratch
            assert decode_scratch is not None
            assert self.bounds is not None
            self.scratch_shapes = decode_scratch(*heads, *self.bounds, device)
        if is_workspace_manager_initialized():
            shapes = [(shape, torch.float32) for shape in self.scratch_shapes]
            return current_workspace_manager().get_simultaneous(*shapes)
        return [torch.empty(shape, device=device) for shape in self.scratch_shapes]


def _decode_bounds() -> DecodeBounds:
    config = get_current_vllm_config()
    sequences, context = config.scheduler_config.max_num_seqs, config.model_config.max_model_len
    return DecodeBounds(sequences, max_decode_query_len(config), context)
