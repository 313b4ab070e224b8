"""KV cache on the CPU, compiled; semantics: kernels/reference/kv_cache.py."""

import math
from collections.abc import Callable
from functools import cache

import torch

from infoquant_vllm.format import apply_hadamard
from infoquant_vllm.kernels.native.library import DTYPES, FLOAT, POINTER, SIZE, function


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    key_clip: torch.Tensor,
    value_clip: torch.Tensor,
    key_offset: torch.Tensor | None,
    hadamard: bool,
    num_bits: tuple[int, int],
) -> None:
    """As the reference, of [tokens, kv_heads, head_size] with any distance between tokens."""
    tokens = len(slots)
    _, kv_heads, size = key.shape
    if hadamard and not _butterflies(size):
        key = key[:tokens].float() if key_offset is None else key[:tokens].float() - key_offset
        key, key_offset, hadamard = apply_hadamard(key), None, False
    key, value = _rows(key), _rows(value)
    _store()(
        key.data_ptr(),
        value.data_ptr(),
        DTYPES[key.dtype],
        DTYPES[value.dtype],
        key.stride(0),
        value.stride(0),
        *_pages(cache),
        slots.contiguous().data_ptr(),
        tokens,
        key_clip.data_ptr(),
        value_clip.data_ptr(),
        0 if key_offset is None else key_offset.data_ptr(),
        kv_heads,
        size,
        *num_bits,
        hadamard,
    )


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
    _, heads, size = query.shape
    if hadamard and not _butterflies(size):
        query, hadamard = apply_hadamard(query.float()), False
    query = _rows(query)
    assert out.stride()[1:] == (size, 1)
    assert query_starts.dtype == seq_lens.dtype == block_table.dtype == torch.int32
    assert query_starts.stride() == seq_lens.stride() == (1,)
    assert block_table.stride(1) == 1
    _attention()(
        query.data_ptr(),
        out.data_ptr(),
        DTYPES[query.dtype],
        DTYPES[out.dtype],
        query.stride(0),
        out.stride(0),
        *_pages(cache),
        query_starts.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        len(seq_lens),
        block_table.stride(0),
        heads,
        cache.shape[1],
        size,
        *num_bits,
        hadamard,
        scale * math.log2(math.e),
        window or 0,
    )


def _butterflies(size: int) -> bool:
    """Whether the compiled kernels do the Hadamard of this size, or torch before they are called."""
    return size & (size - 1) == 0


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _pages(cache: torch.Tensor) -> tuple[int, int, int, int]:
    assert cache.stride()[2:] == (cache.shape[3], 1)
    return cache.data_ptr(), cache.stride(0), cache.stride(1), cache.shape[2]


@cache
def _store() -> Callable[..., None]:
    pages, tensors = (POINTER, SIZE, SIZE, SIZE), (POINTER, POINTER, SIZE, SIZE, SIZE, SIZE)
    return function("infoquant_kv_store", *tensors, *pages, POINTER, SIZE, POINTER, POINTER, POINTER, *(SIZE,) * 5)


@cache
def _attention() -> Callable[..., None]:
    pages, tensors = (POINTER, SIZE, SIZE, SIZE), (POINTER, POINTER, SIZE, SIZE, SIZE, SIZE)
    batch = (POINTER, POINTER, POINTER, SIZE, SIZE)
    return function("infoquant_kv_attention", *tensors, *pages, *batch, *(SIZE,) * 6, FLOAT, SIZE)
