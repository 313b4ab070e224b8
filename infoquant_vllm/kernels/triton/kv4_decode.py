"""Attention over the quantized cache for sequences of a few queries; what a program does: `attend`, in kv4_attend.

A context is cut into parts (Dao et al., Flash-Decoding, 2023). Where they begin depends on the layer and on a query's
position alone, and they are added in their order, whether one program goes through them or many do: a row is the same
bits in every batch. Queries of a sequence share a program's tile, so that the cache is read once for all of them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.operands import KVScheme, ScoreParams, Sequences
from infoquant_vllm.kernels.triton import configurations
from infoquant_vllm.kernels.triton.head_hadamard import dense_factor
from infoquant_vllm.kernels.triton.kv4_attend import LOWEST, approximate, attend, read_query, store_halves
from infoquant_vllm.kernels.triton.kv4_tiles import (
    Layer,
    decode_constants,
    decode_slots,
    most_parts,
    query_scales,
    reduce_constants,
    sequences_in_parts,
)

Shape = tuple[int, ...]


@triton.jit
def context_parts(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """The first chunk that a query at `position` sees, how many chunks a part has, and how many parts there are.

    A part has GROUP chunks at least, so that what parts write and read again is a small share of what they read.
    """
    first = tl.maximum(position - WINDOW + 1, 0) // CHUNK if WINDOW > 0 else position * 0
    chunks = position // CHUNK + 1 - first
    share = tl.maximum(tl.cdiv(chunks, PARTS), GROUP)
    return first, share, tl.cdiv(chunks, share)


@triton.jit
def merge(result, upper, largest, total, part_result, part_upper, part_largest, part_total):
    """Add a part's rows to those before it, each relative to a power of two; wherever, by the same instructions."""
    greater = tl.maximum(largest, part_largest)
    old, new = approximate(largest - greater, "ex2"), approximate(part_largest - greater, "ex2")
    result = tl.fma(result, old[:, None], part_result * new[:, None])
    upper = tl.fma(upper, old[:, None], part_upper * new[:, None])
    return result, upper, greater, tl.fma(total, old, part_total * new)


@triton.jit(do_not_specialize=["starts_ptr", "lens_ptr", "table_ptr"])
def kv4_decode_kernel(
    query_ptr,
    cache_ptr,
    starts_ptr,
    lens_ptr,
    table_ptr,
    factor_ptr,
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
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    ORDER: tl.constexpr,
    LOG_N: tl.constexpr,
    HADAMARD: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Parts of the context for the heads of a kv-head and up to QUERIES queries at once.

    SPLIT: the parts `slot`, `slot` + slots and so on, each written to a place of its own: sums [HEAD] relative to a
    power of two, the power, and the total of weights. Otherwise one program adds up all parts and writes the output.
    """
    sequence, kv_head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, length = tl.load(starts_ptr + sequence), tl.load(lens_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - start
    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row % GROUP
    done = count * 0
    while done < count:
        first, share, parts = context_parts(length - count + done, WINDOW, CHUNK, PARTS, GROUP)
        query = done + row // GROUP
        position = length - count + query
        there = row < QUERIES * GROUP
        taken = 1
        if QUERIES > 1:  # those after the first whose contexts are cut at the same places
            own_first, own_share, own_parts = context_parts(position, WINDOW, CHUNK, PARTS, GROUP)
            there = there & (query < count) & (own_first == first) & (own_share == share)
            parts = tl.max(tl.where(there, own_parts, 0), 0)
            taken = tl.sum(there.to(tl.int32), 0) // GROUP
        if SPLIT:
            parts = tl.minimum(parts, MOST_PARTS)
        if slot < parts:
            token = (start + query).to(tl.int64)
            rows_ptr = query_ptr + token * query_token_stride + head * query_head_stride
            whole, step = read_query(rows_ptr, factor_ptr, norm, there, HEAD, ROWS, SIZE, ORDER, LOG_N, HADAMARD)
            result = tl.zeros([ROWS, SIZE * VALUE_BITS // 8], tl.float32)
            upper = tl.zeros([ROWS, SIZE * VALUE_BITS // 8], tl.float32)
            largest, total = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
            for part in range(slot, parts, tl.num_programs(2)):
                part_result, part_upper, part_largest, part_total = attend(
                    whole,
                    step,
                    position,
                    (first + part * share) * CHUNK,
                    tl.minimum((first + (part + 1) * share) * CHUNK, length - count + done + taken),
                    cache_ptr + kv_head.to(tl.int64) * cache_head_stride,
                    table_ptr + sequence.to(tl.int64) * table_stride,
                    cache_block_stride,
                    log_scale,
                    WINDOW,
                    SOFT_CAP,
                    BLOCK,
                    HEAD,
                    ROWS,
                    SIZE,
                    CHUNK,
                    KEY_BITS,
                    VALUE_BITS,
                )
                if SPLIT:
                    at = (token * num_heads + head) * MOST_PARTS + part
                    tl.store(sums_ptr + 2 * at, part_largest, mask=there)
                    tl.store(sums_ptr + 2 * at + 1, part_total, mask=there)
                    at_ptr = partial_ptr + at * HEAD
                    store_halves(at_ptr, there, part_result, part_upper, ROWS, HEAD, result.shape[1], VALUE_BITS)
                else:
                    result, upper, largest, total = merge(
                        result, upper, largest, total, part_result, part_upper, part_largest, part_total
                    )
            if not SPLIT:
                scale = tl.where(there, 1.0 / total, 0.0)[:, None]
                to_ptr = out_ptr + token * out_token_stride + head * out_head_stride
                store_halves(to_ptr, there, result * scale, upper * scale, ROWS, HEAD, result.shape[1], VALUE_BITS)
        done += taken


@triton.jit(do_not_specialize=["starts_ptr", "lens_ptr"])
def kv4_reduce_kernel(
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
    PARTS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
):
    """The parts of one query and head together, in their order."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    start, length = tl.load(starts_ptr + sequence), tl.load(lens_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - start
    one, features = tl.arange(0, 1), tl.arange(0, SIZE)[None, :]
    for query in range(tl.program_id(2), count, tl.num_programs(2)):
        token = (start + query).to(tl.int64)
        _, _, parts = context_parts(length - count + query, WINDOW, CHUNK, PARTS, GROUP)
        result = tl.zeros([1, SIZE], tl.float32)
        largest, total = tl.full([1], LOWEST, tl.float32), tl.zeros([1], tl.float32)
        for part in tl.static_range(MOST_PARTS):  # all loads are under way at once
            at = (token * num_heads + head) * MOST_PARTS + part
            there = part < parts
            part_largest = tl.load(sums_ptr + 2 * at + one, mask=there, other=LOWEST)
            part_total = tl.load(sums_ptr + 2 * at + 1 + one, mask=there, other=0.0)
            part_result = tl.load(partial_ptr + at * HEAD + features, mask=there & (features < HEAD), other=0.0)
            result, _, largest, total = merge(
                result, result, largest, total, part_result, part_result, part_largest, part_total
            )
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
) -> tuple[Shape, Shape]:
    """Shapes of the float32 scratch that `kv_decode` takes for every batch of up to so many sequences.

    queries: the most of a sequence; context: the most tokens of one. Batches that fill the GPU uncut need none.
    """
    processors = configurations.multiprocessors(device)
    parts = most_parts(configurations.architecture(device), heads, kv_heads, size, window, queries, context)
    tokens = min(sequences, sequences_in_parts(kv_heads, processors)) * queries if parts > 1 else 1
    return (tokens, heads, parts, size), (tokens, heads, parts, 2)


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
    """As the reference but for last bits, of [tokens, heads, head_size] with any distance between tokens and heads.

    queries: the most that a sequence has in any batch of an engine; another number compiles other code. scratch: of the
    shapes of `decode_scratch`, whatever it holds.
    Launches depend on shapes alone: nothing waits for the device, and a CUDA graph serves every batch of its shapes.
    """
    query_starts, seq_lens, block_table = sequences
    scale, window, soft_cap = score
    num_bits, hadamard = scheme
    tokens, heads, size = query.shape
    kv_heads = cache.shape[1]
    if tokens == 0:
        return
    layer = Layer.of(query, cache, out, hadamard, window, num_bits, soft_cap)
    partial, sums = scratch
    slots = decode_slots(kv_heads, len(seq_lens), partial.shape[2], configurations.multiprocessors(query.device))
    assert slots == 1 or len(partial) >= tokens, f"{len(partial)} rows of scratch for {tokens} tokens"
    constants = decode_constants(configurations.architecture(query.device), layer, kv_heads, queries)
    constants |= {"MOST_PARTS": partial.shape[2], "SPLIT": slots > 1}
    kv4_decode_kernel[(len(seq_lens), kv_heads, slots)](
        query,
        cache,
        query_starts,
        seq_lens,
        block_table,
        dense_factor(size, query.device) if hadamard else None,
        out,
        partial,
        sums,
        *query_scales(size, scale),
        heads,
        *query.stride()[:2],
        *cache.stride()[:2],
        block_table.stride(0),
        *out.stride()[:2],
        **constants,
    )
    if slots > 1:
        kv4_reduce_kernel[(len(seq_lens), heads, constants["QUERIES"])](
            partial,
            sums,
            query_starts,
            seq_lens,
            out,
            heads,
            *out.stride()[:2],
            **reduce_constants(constants),
        )
