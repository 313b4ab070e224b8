"""Attention over the quantized cache for sequences of a few queries; the loop of a program is `attend`.

A context is cut into KV splits (Dao et al., Flash-Decoding, 2023). Where they begin depends on the layer and on a
query's position alone, and they are added in their order, whether one program goes through them or many do: a row is
the same bits in every batch. Queries of a sequence share a program's tile, so that the cache is read once for them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.operands import KVScheme, ScoreParams, Sequences
from infoquant_vllm.kernels.triton import common, tiles
from infoquant_vllm.kernels.triton.attend import (
    LOWEST,
    Pages,
    approximate,
    attend,
    layer_of,
    query_scales,
    read_query,
    store_halves,
)


@triton.jit
def cut_context(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr, KV_SPLITS: tl.constexpr, GROUP: tl.constexpr):
    """Return the first chunk that a query at `position` sees, the chunks of a KV split, and the number of splits.

    A split has GROUP chunks at least, so that partial results, written and read again, are a small part of all bytes.
    """
    first = tl.maximum(position - WINDOW + 1, 0) // CHUNK if WINDOW > 0 else position * 0
    chunks = position // CHUNK + 1 - first
    split_chunks = tl.maximum(tl.cdiv(chunks, KV_SPLITS), GROUP)
    return first, split_chunks, tl.cdiv(chunks, split_chunks)


@triton.jit
def merge(sums, split_sums):
    """Add the sums of a KV split to those before it, each (result, upper, largest, total) relative to 2^largest.

    The same instructions wherever it is inlined.
    """
    result, upper, largest, total = sums
    split_result, split_upper, split_largest, split_total = split_sums
    greater = tl.maximum(largest, split_largest)
    old, new = approximate(largest - greater, "ex2"), approximate(split_largest - greater, "ex2")
    result = tl.fma(result, old[:, None], split_result * new[:, None])
    upper = tl.fma(upper, old[:, None], split_upper * new[:, None])
    return result, upper, greater, tl.fma(total, old, split_total * new)


@triton.jit(do_not_specialize=["starts_ptr", "lens_ptr", "table_ptr"])
def kv_decode_kernel(
    query_ptr,
    cache_ptr,
    starts_ptr,
    lens_ptr,
    table_ptr,
    hadamard_ptr,
    out_ptr,
    partial_ptr,
    sums_ptr,
    norm,
    log_scale,
    num_heads,
    query_token_stride,
    query_head_stride,
    cache_block_stride,
    cache_head_stride,
    table_stride,
    out_token_stride,
    out_head_stride,
    SHAPE: tl.constexpr,
    QUERIES: tl.constexpr,
    KV_SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Attend from the heads of a kv-head and up to QUERIES queries at once to KV splits of the context.

    PARTIAL: a program takes every num_programs(2)-th split and writes each to scratch of MAX_SPLITS: results [HEAD]
    relative to a power of two, the power, and the total of weights. Otherwise one program adds up all splits and writes
    the output. hadamard_ptr: as for `kv_attention_kernel`.
    """
    sequence, kv_head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(starts_ptr + sequence), tl.load(lens_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - start
    ROWS: tl.constexpr = SHAPE.rows
    GROUP: tl.constexpr = SHAPE.group
    CHUNK: tl.constexpr = SHAPE.chunk
    HALF: tl.constexpr = SHAPE.size * SHAPE.value_bits // 8
    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row % GROUP
    done = count * 0
    while done < count:
        first, split_chunks, splits = cut_context(length - count + done, SHAPE.window, CHUNK, KV_SPLITS, GROUP)
        query = done + row // GROUP
        position = length - count + query
        mask = row < QUERIES * GROUP
        taken = 1
        if QUERIES > 1:  # the following queries whose contexts are cut at the same places
            own_first, own_chunks, own_splits = cut_context(position, SHAPE.window, CHUNK, KV_SPLITS, GROUP)
            mask = mask & (query < count) & (own_first == first) & (own_chunks == split_chunks)
            splits = tl.max(tl.where(mask, own_splits, 0), 0)
            taken = tl.sum(mask.to(tl.int32), 0) // GROUP
        if PARTIAL:
            splits = tl.minimum(splits, MAX_SPLITS)
        if slot < splits:
            token = (start + query).to(tl.int64)
            rows_ptr = query_ptr + token * query_token_stride + head * query_head_stride
            integers, step = read_query(rows_ptr, hadamard_ptr, norm, mask, SHAPE)
            result = tl.zeros([ROWS, HALF], tl.float32)
            upper = tl.zeros([ROWS, HALF], tl.float32)
            largest, total = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
            for split in range(slot, splits, tl.num_programs(2)):
                pages = Pages(
                    cache_ptr + kv_head.to(tl.int64) * cache_head_stride,
                    table_ptr + sequence.to(tl.int64) * table_stride,
                    cache_block_stride,
                )
                begin = (first + split * split_chunks) * CHUNK
                end = tl.minimum((first + (split + 1) * split_chunks) * CHUNK, length - count + done + taken)
                sums = attend(integers, step, position, begin, end, pages, log_scale, SHAPE)
                if PARTIAL:
                    split_result, split_upper, split_largest, split_total = sums
                    at = (token * num_heads + head) * MAX_SPLITS + split
                    tl.store(sums_ptr + 2 * at, split_largest, mask=mask)
                    tl.store(sums_ptr + 2 * at + 1, split_total, mask=mask)
                    at_ptr = partial_ptr + at * SHAPE.head
                    store_halves(at_ptr, mask, split_result, split_upper, SHAPE.head, SHAPE.value_bits)
                else:
                    result, upper, largest, total = merge((result, upper, largest, total), sums)
            if not PARTIAL:
                scale = tl.where(mask, 1.0 / total, 0.0)[:, None]
                to_ptr = out_ptr + token * out_token_stride + head * out_head_stride
                store_halves(to_ptr, mask, result * scale, upper * scale, SHAPE.head, SHAPE.value_bits)
        done += taken


@triton.jit(do_not_specialize=["starts_ptr", "lens_ptr"])
def kv_splits_reduce_kernel(
    partial_ptr,
    sums_ptr,
    starts_ptr,
    lens_ptr,
    out_ptr,
    num_heads,
    out_token_stride,
    out_head_stride,
    WINDOW: tl.constexpr,
    HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    KV_SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Add up the KV splits of one query and head, in their order."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    start, length = tl.load(starts_ptr + sequence), tl.load(lens_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - start
    one, features = tl.arange(0, 1), tl.arange(0, SIZE)[None, :]
    for query in range(tl.program_id(2), count, tl.num_programs(2)):
        token = (start + query).to(tl.int64)
        _, _, splits = cut_context(length - count + query, WINDOW, CHUNK, KV_SPLITS, GROUP)
        result = tl.zeros([1, SIZE], tl.float32)
        largest, total = tl.full([1], LOWEST, tl.float32), tl.zeros([1], tl.float32)
        for split in tl.static_range(MAX_SPLITS):  # all loads are in flight at once
            at = (token * num_heads + head) * MAX_SPLITS + split
            mask = split < splits
            split_largest = tl.load(sums_ptr + 2 * at + one, mask=mask, other=LOWEST)
            split_total = tl.load(sums_ptr + 2 * at + 1 + one, mask=mask, other=0.0)
            split_result = tl.load(partial_ptr + at * HEAD + features, mask=mask & (features < HEAD), other=0.0)
            split_sums = split_result, split_result, split_largest, split_total
            result, _, largest, total = merge((result, result, largest, total), split_sums)
        to_ptr = out_ptr + token * out_token_stride + head * out_head_stride + features
        tl.store(to_ptr, (result * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty), mask=features < HEAD)


def decode_scratch(
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
    sequences: int,
    queries: int,
    context: int,
    device: torch.device,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the float32 scratch that `kv_decode` takes for every batch of up to so many sequences.

    queries: the most of a sequence; context: the most tokens of one. Batches that fill the GPU unsplit need none.
    """
    splits = tiles.max_kv_splits(common.architecture(device), heads, kv_heads, size, window, queries, context)
    split_sequences = tiles.max_split_sequences(kv_heads, tiles.multiprocessors(device))
    tokens = min(sequences, split_sequences) * queries if splits > 1 else 1
    return (tokens, heads, splits, size), (tokens, heads, splits, 2)


def kv_decode(
    query: torch.Tensor,
    cache: torch.Tensor,
    sequences: Sequences,
    score: ScoreParams,
    scheme: KVScheme,
    out: torch.Tensor,
    queries: int,
    scratch: Sequence[torch.Tensor],
) -> None:
    """Compute the reference's attention, but for last bits; [tokens, heads, head_size] may have any strides of both.

    queries: the most that a sequence has in any batch of an engine; another number compiles other code. scratch: of the
    shapes of `decode_scratch`, its values do not matter. Launches depend on shapes alone: nothing waits for the device,
    and a CUDA graph serves every batch of its shapes.
    """
    query_starts, seq_lens, block_table = sequences
    scale, window, soft_cap = score
    num_bits, hadamard = scheme
    tokens, heads, size = query.shape
    kv_heads = cache.shape[1]
    if tokens == 0:
        return
    layer = layer_of(query, cache, out, hadamard, window, num_bits, soft_cap)
    together = tiles.shared_queries(size, layer.group, queries)
    tile = tiles.attention_tile(common.architecture(query.device), "kv_decode", size, layer.group * together)
    partial, sums = scratch
    splits, sms = partial.shape[2], tiles.multiprocessors(query.device)
    programs = tiles.decode_programs(kv_heads, len(seq_lens), splits, sms)
    assert programs == 1 or len(partial) >= tokens, f"{len(partial)} rows of scratch for {tokens} tokens"
    constants = layer.constants(tile)
    cuts = {"KV_SPLITS": tiles.kv_splits(kv_heads), "MAX_SPLITS": splits}
    kv_decode_kernel[(len(seq_lens), kv_heads, programs)](
        query,
        cache,
        query_starts,
        seq_lens,
        block_table,
        common.base_matrix(size, query.device) if hadamard else None,
        out,
        partial,
        sums,
        *query_scales(size, scale),
        heads,
        *query.stride()[:2],
        *cache.stride()[:2],
        block_table.stride(0),
        *out.stride()[:2],
        QUERIES=together,
        PARTIAL=programs > 1,
        **cuts,
        **constants,
    )
    if programs > 1:
        shape = constants["SHAPE"]
        kv_splits_reduce_kernel[(len(seq_lens), heads, together)](
            partial,
            sums,
            query_starts,
            seq_lens,
            out,
            heads,
            *out.stride()[:2],
            WINDOW=shape.window,
            HEAD=shape.head,
            GROUP=shape.group,
            SIZE=shape.size,
            CHUNK=shape.chunk,
            **cuts,
            enable_fp_fusion=True,
            num_warps=4,
        )
