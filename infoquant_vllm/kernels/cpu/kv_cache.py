"""KV cache on the CPU, compiled; semantics: kernels/reference/kv_cache.py."""

import math

import torch

from infoquant_vllm.format import apply_hadamard
from infoquant_vllm.kernels.cpu.library import operations


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    key_clip_ratio: torch.Tensor,
    value_clip_ratio: torch.Tensor,
    key_mean: torch.Tensor | None,
    hadamard: bool,
    num_bits: tuple[int, int],
) -> None:
    """As the reference, of [tokens, kv_heads, head_size] with any distance between tokens."""
    tokens = len(slots)
    if hadamard and not _butterflies(key.shape[2]):
        key = key[:tokens].float() if key_mean is None else key[:tokens].float() - key_mean
        key, key_mean, hadamard = apply_hadamard(key), None, False
    operations().kv_store(key, value, cache, slots, key_clip_ratio, value_clip_ratio, key_mean, hadamard, *num_bits)


def kv_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    hadamard: bool,
    scale: float,
    window: int | None,
    num_bits: tuple[int, int],
    out: torch.Tensor,
) -> None:
    """As the reference, of [tokens, heads, head_size] with any distance between tokens."""
    if hadamard and not _butterflies(query.shape[2]):
        query, hadamard = apply_hadamard(query.float()), False
    lengths, log_base = (query_starts, seq_lens, block_table), math.log2(math.e)
    operations().kv_attention(query, cache, *lengths, hadamard, scale * log_base, window or 0, *num_bits, out)


def _butterflies(size: int) -> bool:
    """Whether the compiled kernels do the Hadamard of this size, or torch before they are called."""
    return size & (size - 1) == 0
