"""Attention over the quantised cache, over whole batches; what a program does: `attend`, in kv4_attend.

A batch of single queries is cut over the context as well (Dao et al., Flash-Decoding, 2023): the number of parts hangs
on the layer and the sequence's length alone, and their sum has one order, so a row is the same bits in every batch.
"""

import math

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.triton import configurations
from infoquant_vllm.kernels.triton.head_hadamard import dense_factor
from infoquant_vllm.kernels.triton.kv4_attend import LOWEST, attend, read_query
from infoquant_vllm.kernels.triton.kv4_tiles import Layer, decode_constants, mixed_constants, reduce_constants


@triton.jit
def store_halves(
    ptr, there, result, upper, ROWS: tl.constexpr, HEAD: tl.constexpr, HALF: tl.constexpr, VALUE_BITS: tl.constexpr
):
    """Write rows of results to ptr [ROWS], in the dtype that it points to."""
    STORED: tl.constexpr = HEAD * VALUE_BITS // 8
    features = tl.arange(0, HALF)
    mask = there[:, None] & (features < STORED)[None, :]
    out_ptr = ptr[:, None] + features[None, :]
    tl.store(out_ptr, result.to(ptr.dtype.element_ty), mask=mask)
    if VALUE_BITS == 4:
        tl.store(out_ptr + STORED, upper.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_sequences", "starts_ptr", "lens_ptr"])
def kv4_attention_kernel(
    query_ptr,
    cache_ptr,
    starts_ptr,
    lens_ptr,
    table_ptr,
    factor_ptr,
    out_ptr,
    norm,
    log_scale,
    num_sequences,
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
):
    """ROWS // GROUP queries of one sequence, all heads of a kv-head: prompts, their chunks, mixed batches.

    How many programs a batch takes is bounded by its shapes; those beyond its queries return at once.
    """
    QUERIES: tl.constexpr = ROWS // GROUP
    program, kv_head = tl.program_id(0), tl.program_id(1)
    sequence, beyond = program * 0, num_sequences
    while beyond - sequence > 1:  # sequence i begins at program starts[i] // QUERIES + i
        middle = (sequence + beyond) // 2
        if tl.load(starts_ptr + middle) // QUERIES + middle <= program:
            sequence = middle
        else:
            beyond = middle
    start, end = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    from_start = (program - start // QUERIES - sequence) * QUERIES
    if from_start >= end - start:
        return
    length = tl.load(lens_ptr + sequence)
    row = tl.arange(0, ROWS)
    query = from_start + row // GROUP
    there = (row < QUERIES * GROUP) & (query < end - start)
    position = length - (end - start) + query
    first_seen = length - (end - start) + from_start
    last_seen = tl.minimum(first_seen + QUERIES, length)
    first = tl.maximum(first_seen - WINDOW + 1, 0) // CHUNK * CHUNK if WINDOW > 0 else 0

    token = (start + query).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    rows_ptr = query_ptr + token * query_token_stride + head * query_head_stride
    whole, step = read_query(rows_ptr, factor_ptr, norm, there, HEAD, ROWS, SIZE, ORDER, LOG_N, HADAMARD)
    result, upper, _, total = attend(
        whole,
        step,
        position,
        first,
        last_seen,
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
    out_ptr += token * out_token_stride + head * out_head_stride
    share = tl.where(there, 1.0 / total, 0.0)[:, None]
    store_halves(out_ptr, there, result * share, upper * share, ROWS, HEAD, result.shape[1], VALUE_BITS)


@triton.jit
def part_of(position, part, WINDOW: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """Where a part of what a query at `position` sees begins and ends, in whole chunks; none is left beyond the last.

    A part has GROUP chunks at least, so that what parts write and read again is a small share of what they read.
    """
    first = tl.maximum(position - WINDOW + 1, 0) // CHUNK if WINDOW > 0 else 0
    chunks = position // CHUNK + 1 - first
    share = tl.maximum(tl.cdiv(chunks, PARTS), GROUP)
    return (first + part * share) * CHUNK, tl.minimum((first + (part + 1) * share) * CHUNK, position + 1)


@triton.jit(do_not_specialize=["starts_ptr", "lens_ptr"])
def kv4_decode_kernel(
    query_ptr,
    cache_ptr,
    starts_ptr,
    lens_ptr,
    table_ptr,
    factor_ptr,
    partial_ptr,
    largest_ptr,
    total_ptr,
    norm,
    log_scale,
    num_heads,
    query_token_stride,
    query_head_stride,
    cache_block_stride,
    cache_head_stride,
    table_stride,
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
    PARTS: tl.constexpr,
):
    """One part of the context for the heads of a kv-head: sums [HEAD] relative to a power of two, power and total.

    A sequence has one query as a rule; should it have more they follow one another.
    """
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end, length = (
        tl.load(starts_ptr + sequence),
        tl.load(starts_ptr + sequence + 1),
        tl.load(lens_ptr + sequence),
    )
    row = tl.arange(0, ROWS)
    there = row < GROUP
    head = kv_head * GROUP + row
    for query in range(end - start):
        token, position = start.to(tl.int64) + query, length - (end - start) + query
        first, last = part_of(position, part, WINDOW, CHUNK, PARTS, GROUP)
        if first < last:
            rows_ptr = query_ptr + token * query_token_stride + head * query_head_stride
            whole, step = read_query(rows_ptr, factor_ptr, norm, there, HEAD, ROWS, SIZE, ORDER, LOG_N, HADAMARD)
            result, upper, largest, total = attend(
                whole,
                step,
                position + row * 0,
                first,
                last,
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
            at = (token * num_heads + head) * PARTS + part
            tl.store(largest_ptr + at, largest, mask=there)
            tl.store(total_ptr + at, total, mask=there)
            store_halves(partial_ptr + at * HEAD, there, result, upper, ROWS, HEAD, result.shape[1], VALUE_BITS)


@triton.jit(do_not_specialize=["starts_ptr", "lens_ptr"])
def kv4_reduce_kernel(
    partial_ptr,
    largest_ptr,
    total_ptr,
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
):
    """The parts of one sequence and head together: sum 2^(largest_p - largest) partial_p over the same of totals."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    start, end, length = (
        tl.load(starts_ptr + sequence),
        tl.load(starts_ptr + sequence + 1),
        tl.load(lens_ptr + sequence),
    )
    part, features = tl.arange(0, PARTS), tl.arange(0, SIZE)
    for query in range(end - start):
        token = start.to(tl.int64) + query
        first, last = part_of(length - (end - start) + query, part, WINDOW, CHUNK, PARTS, GROUP)
        there = first < last
        at = (token * num_heads + head) * PARTS + part
        power = tl.load(largest_ptr + at, mask=there, other=LOWEST)
        factor = tl.where(there, tl.exp2(power - tl.max(power, 0)), 0.0)
        total = tl.sum(tl.load(total_ptr + at, mask=there, other=0.0) * factor, 0)
        mask = there[:, None] & (features < HEAD)[None, :]
        partial = tl.load(partial_ptr + at[:, None] * HEAD + features[None, :], mask=mask, other=0.0)
        result = tl.sum(partial * factor[:, None], 0) / total
        at = token * out_token_stride + head * out_head_stride + features
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask=features < HEAD)


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
    soft_cap: float | None = None,
) -> None:
    """As the reference but for last bits, of [tokens, heads, head_size] with any distance between tokens and heads.

    Launches hang on shapes alone: nothing waits for the device, and a CUDA graph serves every batch of its shapes.
    """
    tokens, heads, size = query.shape
    kv_heads, block = cache.shape[1:3]
    assert query.stride(2) == out.stride(2) == 1, "features of a head must be side by side"
    assert cache.stride()[2:] == (cache.shape[3], 1), "cells of a page must be side by side"
    if tokens == 0:
        return
    factor = dense_factor(size, query.device) if hadamard else None
    lengths = (query_starts, seq_lens, block_table)
    scales = (1 / math.sqrt(size), scale * math.log2(math.e))
    arch = configurations.architecture(query.device)
    cap = (soft_cap or 0.0) * math.log2(math.e)
    layer = Layer(block, size, heads // kv_heads, num_bits, hadamard, window or 0, cap)
    if tokens > len(seq_lens):
        constants = mixed_constants(arch, layer)
        programs = tokens // (constants["ROWS"] // constants["GROUP"]) + len(seq_lens)
        kv4_attention_kernel[(programs, kv_heads)](
            query,
            cache,
            *lengths,
            factor,
            out,
            *scales,
            len(seq_lens),
            *query.stride()[:2],
            *cache.stride()[:2],
            block_table.stride(0),
            *out.stride()[:2],
            **constants,
        )
        return
    constants = decode_constants(arch, layer, kv_heads)
    parts = constants["PARTS"]
    partial = query.new_empty((tokens, heads, parts, size), dtype=torch.float32)
    largest, total = query.new_empty((2, tokens, heads, parts), dtype=torch.float32)
    kv4_decode_kernel[(len(seq_lens), kv_heads, parts)](
        query,
        cache,
        *lengths,
        factor,
        partial,
        largest,
        total,
        *scales,
        heads,
        *query.stride()[:2],
        *cache.stride()[:2],
        block_table.stride(0),
        **constants,
    )
    kv4_reduce_kernel[(len(seq_lens), heads)](
        partial,
        largest,
        total,
        query_starts,
        seq_lens,
        out,
        heads,
        *out.stride()[:2],
        **reduce_constants(constants),
    )
