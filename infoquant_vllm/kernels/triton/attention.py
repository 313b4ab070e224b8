"""Attention over the quantized cache for prompts and their chunks; the loop of a program is `attend`."""

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.operands import KVScheme, ScoreParams, Sequences
from infoquant_vllm.kernels.triton import common
from infoquant_vllm.kernels.triton.attend import Pages, attend, layer_of, query_scales, read_query, store_halves
from infoquant_vllm.kernels.triton.tiles import attention_tile


# A batch's own tensors are slices that begin anywhere: specializing on their alignment would compile while serving.
@triton.jit(do_not_specialize=["num_sequences", "starts_ptr", "lens_ptr", "table_ptr"])
def kv_attention_kernel(
    query_ptr,
    cache_ptr,
    starts_ptr,
    lens_ptr,
    table_ptr,
    hadamard_ptr,
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
    SHAPE: tl.constexpr,
):
    """Attend from ROWS // GROUP queries of one sequence, all heads of a kv-head.

    hadamard_ptr: the base matrix of the queries' Hadamard, None without one. The number of programs is bounded by the
    batch's shapes; those beyond its queries return at once.
    """
    QUERIES: tl.constexpr = SHAPE.rows // SHAPE.group
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
    row = tl.arange(0, SHAPE.rows)
    query = from_start + row // SHAPE.group
    mask = (row < QUERIES * SHAPE.group) & (query < end - start)
    position = length - (end - start) + query
    first_seen = length - (end - start) + from_start
    last_seen = tl.minimum(first_seen + QUERIES, length)
    first = 0
    if SHAPE.window > 0:
        first = tl.maximum(first_seen - SHAPE.window + 1, 0) // SHAPE.chunk * SHAPE.chunk

    token = (start + query).to(tl.int64)
    head = kv_head * SHAPE.group + row % SHAPE.group
    rows_ptr = query_ptr + token * query_token_stride + head * query_head_stride
    integers, step = read_query(rows_ptr, hadamard_ptr, norm, mask, SHAPE)
    pages = Pages(
        cache_ptr + kv_head.to(tl.int64) * cache_head_stride,
        table_ptr + sequence.to(tl.int64) * table_stride,
        cache_block_stride,
    )
    result, upper, _, total = attend(integers, step, position, first, last_seen, pages, log_scale, SHAPE)
    out_ptr += token * out_token_stride + head * out_head_stride
    scale = tl.where(mask, 1.0 / total, 0.0)[:, None]
    store_halves(out_ptr, mask, result * scale, upper * scale, SHAPE.head, SHAPE.value_bits)


def kv_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    sequences: Sequences,
    score: ScoreParams,
    scheme: KVScheme,
    out: torch.Tensor,
) -> None:
    """Compute the reference's attention, but for last bits; [tokens, heads, head_size] may have any strides of both.

    The sequences may be the last of a batch: `query` and `out` begin at token query_starts[0].
    """
    query_starts, seq_lens, block_table = sequences
    scale, window, soft_cap = score
    num_bits, hadamard = scheme
    (tokens, _, size), kv_heads = query.shape, cache.shape[1]
    if tokens == 0:
        return
    layer = layer_of(query, cache, out, hadamard, window, num_bits, soft_cap)
    tile = attention_tile(common.architecture(query.device), "kv_attention", size, layer.group)
    programs = tokens // (tile.rows // layer.group) + len(seq_lens)
    kv_attention_kernel[(programs, kv_heads)](
        query,
        cache,
        query_starts,
        seq_lens,
        block_table,
        common.base_matrix(size, query.device) if hadamard else None,
        out,
        *query_scales(size, scale),
        len(seq_lens),
        *query.stride()[:2],
        *cache.stride()[:2],
        block_table.stride(0),
        *out.stride()[:2],
        **layer.constants(tile),
    )
