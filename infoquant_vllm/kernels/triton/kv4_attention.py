"""Attention over the quantized cache for prompts and their chunks; what a program does: `attend`, in kv4_attend."""

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.operands import KVScheme, ScoreParams, Sequences
from infoquant_vllm.kernels.triton import configurations
from infoquant_vllm.kernels.triton.head_hadamard import dense_factor
from infoquant_vllm.kernels.triton.kv4_attend import attend, read_query, store_halves
from infoquant_vllm.kernels.triton.kv4_tiles import Layer, prompt_constants, query_scales


# What is of a batch, a slice of which begins anywhere, may not compile anything while serving.
@triton.jit(do_not_specialize=["num_sequences", "starts_ptr", "lens_ptr", "table_ptr"])
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
    """ROWS // GROUP queries of one sequence, all heads of a kv-head.

    How many programs a batch takes is bounded by its shapes; those beyond its queries return at once.
    """
    QUERIES: tl.constexpr = ROWS // GROUP
    program, kv_head = tl.program_id(0), tl.program_id(1)
    sequence, beyond, base = program * 0, num_sequences, tl.load(starts_ptr)
    while beyond - sequence > 1:  # sequence i begins at program (starts[i] - base) // QUERIES + i
        middle = (sequence + beyond) // 2
        if (tl.load(starts_ptr + middle) - base) // QUERIES + middle <= program:
            sequence = middle
        else:
            beyond = middle
    start, end = tl.load(starts_ptr + sequence) - base, tl.load(starts_ptr + sequence + 1) - base
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


def kv_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    sequences: Sequences,
    score: ScoreParams,
    scheme: KVScheme,
    out: torch.Tensor,
) -> None:
    """As the reference but for last bits, of [tokens, heads, head_size] with any distance between tokens and heads.

    The sequences may be the last of a batch: `query` and `out` begin at token query_starts[0].
    """
    query_starts, seq_lens, block_table = sequences
    scale, window, soft_cap = score
    num_bits, hadamard = scheme
    (tokens, _, size), kv_heads = query.shape, cache.shape[1]
    if tokens == 0:
        return
    layer = Layer.of(query, cache, out, hadamard, window, num_bits, soft_cap)
    constants = prompt_constants(configurations.architecture(query.device), layer)
    programs = tokens // (constants["ROWS"] // constants["GROUP"]) + len(seq_lens)
    kv4_attention_kernel[(programs, kv_heads)](
        query,
        cache,
        query_starts,
        seq_lens,
        block_table,
        dense_factor(size, query.device) if hadamard else None,
        out,
        *query_scales(size, scale),
        len(seq_lens),
        *query.stride()[:2],
        *cache.stride()[:2],
        block_table.stride(0),
        *out.stride()[:2],
        **constants,
    )
