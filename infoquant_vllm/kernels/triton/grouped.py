"""Kernels of mixtures of experts: tokens by expert, the product of all experts, and the sums over a token's experts.

A token that goes to some experts has a routed row for each: row t * chosen + j is token t in its expert j. Rows are
dealt to slots, tiles of rows of one expert, so that only experts with tokens are read. Nothing is added by atomics: no
result depends on which program is faster.
"""

import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.common import narrow
from infoquant_vllm.kernels.triton.gemm import (
    OutputTile,
    Scales,
    Slot,
    banded,
    finish,
    multiply_segments,
    slot_tokens,
    weight_sums,
)


@triton.jit(do_not_specialize=["count", "experts", "slots", "height"])
def align_kernel(
    chosen_ptr,
    rows_ptr,
    slot_ptr,
    count,
    experts,
    slots,
    height,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Deal routed rows to slots: program e does it for expert e.

    chosen [count] int32, the expert of each row, -1: none here; rows [slots, height] int32, rows of a slot in their
    order and `count` behind them; slot [slots] int32, experts of the slots, and -1 of those behind the last. BINS is a
    power of two above `experts`; height is at most CHUNK.
    """
    expert = tl.program_id(0)
    bins, index = tl.arange(0, BINS), tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for first in tl.range(0, count, CHUNK):
        chosen = tl.load(chosen_ptr + first + index, first + index < count, other=-1)
        counts += tl.histogram(tl.where(chosen < 0, BINS - 1, chosen), BINS)
    needed = tl.cdiv(counts, height)
    own = tl.sum(tl.where(bins == expert, counts, 0))
    first_slot, own_slots = tl.sum(tl.where(bins < expert, needed, 0)), tl.cdiv(own, height)
    rows_ptr += first_slot * height
    placed = 0
    for first in tl.range(0, count, CHUNK):
        mine = tl.load(chosen_ptr + first + index, first + index < count, other=-1) == expert
        place = placed + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(rows_ptr + place, first + index, mine)
        placed += tl.sum(mine.to(tl.int32))
    tl.store(rows_ptr + own + index, tl.zeros_like(index) + count, own + index < own_slots * height)
    for first in tl.range(0, own_slots, CHUNK):
        tl.store(slot_ptr + first_slot + first + index, tl.zeros_like(index) + expert, first + index < own_slots)
    used = tl.sum(tl.where(bins < experts, needed, 0))
    for slot in tl.range(used + expert, slots, experts):
        tl.store(slot_ptr + slot, -1)


@triton.jit(do_not_specialize=["M", "count", "chosen", "steps", "features"])
def grouped_gemm_kernel(
    values_ptr,
    scale_ptr,
    zp_offset_ptr,
    sums_ptr,
    weight_ptr,
    weight_scale_ptr,
    word_ptr,
    weight_zero_ptr,
    rows_ptr,
    slot_ptr,
    out_ptr,
    M,
    count,
    chosen,
    expert_bytes,
    N,
    steps,
    values_stride,
    weight_stride,
    features,
    SEGMENTS: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    INT16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
    BAND: tl.constexpr,
):
    """Compute a slot's tile of what `gemm_kernel` computes with the weight of the slot's expert; no bias.

    Quantized rows are M as there: of tokens, which `chosen` routed rows share, or of routed rows, then `chosen` is 1.
    The weight's tensors are stacked by expert, codes every expert_bytes. rows and slot as `align_kernel` leaves them,
    for BLOCK_M rows to a slot, with INT16 half of that; out [count, N], a row for each routed row.
    """
    ROWS: tl.constexpr = 2 if INT16 else 1
    SLOT_ROWS: tl.constexpr = BLOCK_M // ROWS
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_n, slot = banded(tl.program_id(0), tiles_n, tl.num_programs(0) // tiles_n, BAND)
    expert = tl.load(slot_ptr + slot).to(tl.int64)
    if expert < 0:
        return
    rows_ptr += slot * SLOT_ROWS
    tokens = Slot(rows_ptr, count, chosen, ROWS)
    m, m_mask = slot_tokens(tokens, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    weight_ptr += expert * expert_bytes
    weight_rows = weight_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + (n % N).to(tl.int64)[:, None] * weight_stride
    values_rows = values_ptr + m.to(tl.int64)[None, :] * values_stride
    words = word_ptr
    if word_ptr is not None:
        words = word_ptr + expert * (SEGMENTS * steps * (BLOCK_K // RUN)) * N + (n % N)
    weight_zero = weight_zero_ptr if weight_zero_ptr is None else weight_zero_ptr + expert * N
    scales = Scales(scale_ptr, zp_offset_ptr, sums_ptr, weight_sums(weight_ptr, N, weight_stride), weight_zero)
    tile = OutputTile(m, n, m_mask, n_mask, M, N)
    out = multiply_segments(
        weight_rows, values_rows, words, tile, tokens, scales, steps, features, SEGMENTS, WEIGHT_BITS, BLOCK_K, RUN
    )
    row = tl.load(rows_ptr + tl.arange(0, SLOT_ROWS), volatile=True)
    finish(out, row, row < count, tile, weight_scale_ptr + expert * N, None, out_ptr, INT16)


@triton.jit
def combine_kernel(routed_ptr, weight_ptr, chosen_ptr, out_ptr, N, CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add a token's routed rows [tokens * CHOSEN, N] times its weights [tokens, CHOSEN], in order, to out [tokens, N].

    Rows without an expert here (chosen [tokens, CHOSEN] below 0) were never written, and are left out.
    """
    first = tl.program_id(0) * CHOSEN
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for j in tl.static_range(CHOSEN):
        here_mask = n_mask & (tl.load(chosen_ptr + first + j) >= 0)
        row = tl.load(routed_ptr + (first + j).to(tl.int64) * N + n, here_mask, other=0)
        total += tl.load(weight_ptr + first + j) * row.to(tl.float32)
    out = narrow(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * N + n, out, n_mask)
