"""GEMM of int8 activations and packed 4-bit or 8-bit weights, exact in int32 on the INT8 tensor cores.

Weights are the dot's first operand: unpacked in registers, they stay there (Hopper's wgmma reads them from registers;
as the second operand they would go back to shared memory first). The accumulator is [channels, tokens] for that.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.common import NIBBLE_FACTOR, multiply_nibbles, narrow, unpack_nibbles


class OutputTile(NamedTuple):
    """The tokens m and channels n of a program, which of them are in bounds, and how many there are."""

    m: Any
    n: Any
    m_mask: Any
    n_mask: Any
    M: Any
    N: Any


class Slot(NamedTuple):
    """Pointer to the routed rows of a tile, the number of all routed rows and those of a token, see grouped.py."""

    rows_ptr: Any
    count: Any
    chosen: Any
    PER_ROW: Any
    """rows of quantized values to a routed row"""


class Scales(NamedTuple):
    """Pointers to what turns an integer product into a segment's float32 sum; None: no such zero-points."""

    scale_ptr: Any
    zp_offset_ptr: Any
    sums_ptr: Any
    weight_sums_ptr: Any
    weight_zero_ptr: Any


@triton.jit(do_not_specialize=["M", "steps", "split_steps", "features"])
def gemm_kernel(
    values_ptr,
    scale_ptr,
    zp_offset_ptr,
    sums_ptr,
    weight_ptr,
    weight_scale_ptr,
    word_ptr,
    weight_zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    steps,
    split_steps,
    values_stride,
    weight_stride,
    features,
    SEGMENTS: tl.constexpr,
    SPLITS: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    INT16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
    BAND: tl.constexpr,
):
    """Compute a tile of weight_scale[n] * sum_s scale[s, m] * sum_k (value - zp_offset) * integer weight + bias.

    values [M, values_stride] int8; scale [segments, M] float32, zp_offset alike int32 (None: zeros), sums alike of the
    values; weight [N, weight_stride] bytes, behind them sums, and words [runs, N] as `prepare_linear` lays them out;
    weight_scale, weight_zero [N] (None: symmetric, or in the words); bias [N] or None; out [M, N], with INT16 (see
    `finish`) [M / 2, N].

    A segment has `features` and takes `steps`. A program does all segments, or with SPLITS, their number in a segment,
    split_steps of one: then out is int32 [splits, M, N].
    """
    ROWS: tl.constexpr = 2 if INT16 else 1
    tile_n, tile_m = banded(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), BAND)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n_mask, m_mask = n < N, m < M
    # Rows past the end wrap around, which costs no mask in the loop, and are not stored.
    weight_rows = weight_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + (n % N).to(tl.int64)[:, None] * weight_stride
    values_rows = values_ptr + (m % M).to(tl.int64)[None, :] * values_stride
    words = word_ptr if word_ptr is None else word_ptr + (n % N)
    tile = OutputTile(m, n, m_mask, n_mask, M, N)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    if SPLITS > 1:
        segment = tl.program_id(1) // SPLITS
        first = segment * steps + tl.program_id(1) % SPLITS * split_steps
        for step in tl.range(first, tl.minimum(first + split_steps, (segment + 1) * steps)):
            total = _multiply(total, weight_rows, values_rows, words, N, step, WEIGHT_BITS, BLOCK_K, RUN)
        target = (tl.program_id(1) * M + m).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_ptr + target, tl.trans(total), m_mask[:, None] & n_mask[None, :])
    else:
        sums = weight_sums(weight_ptr, N, weight_stride)
        scales = Scales(scale_ptr, zp_offset_ptr, sums_ptr, sums, weight_zero_ptr)
        out = multiply_segments(
            weight_rows, values_rows, words, tile, None, scales, steps, features, SEGMENTS, WEIGHT_BITS, BLOCK_K, RUN
        )
        row = tile_m * (BLOCK_M // ROWS) + tl.arange(0, BLOCK_M // ROWS)
        finish(out, row, row < M // ROWS, tile, weight_scale_ptr, bias_ptr, out_ptr, INT16)


@triton.jit
def banded(index, tiles_n, tiles_m, BAND: tl.constexpr):
    """Order tiles in bands of BAND rows of tokens, so that concurrent programs share operands in the L2 cache."""
    per_band = BAND * tiles_n
    first = index // per_band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    return index % per_band // height, first + index % per_band % height


@triton.jit
def multiply_segments(
    weight_rows,
    values_rows,
    words,
    tile,
    slot,
    scales,
    steps,
    features,
    SEGMENTS: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
):
    """Multiply all segments and return the sum of their scaled products, [tokens, channels] float32.

    slot: where the tile's tokens are from, None: they follow one another.
    """
    GROUPED: tl.constexpr = words is not None
    total = tl.zeros((weight_rows.shape[0], values_rows.shape[1]), tl.int32)
    if SEGMENTS == 1:
        for step in tl.range(0, steps):
            total = _multiply(total, weight_rows, values_rows, words, tile.N, step, WEIGHT_BITS, BLOCK_K, RUN)
        out = scale_segment(tl.trans(total), 0, behind_loop(tile, slot), scales, features, WEIGHT_BITS, GROUPED)
    else:
        out = tl.zeros((values_rows.shape[1], weight_rows.shape[0]), tl.float32)
        for segment in tl.range(0, SEGMENTS):
            part = total
            for step in tl.range(segment * steps, (segment + 1) * steps):
                part = _multiply(part, weight_rows, values_rows, words, tile.N, step, WEIGHT_BITS, BLOCK_K, RUN)
            again = behind_loop(tile, slot)
            out += scale_segment(tl.trans(part), segment, again, scales, features, WEIGHT_BITS, GROUPED)
    return out


@triton.jit
def behind_loop(tile, slot):
    """Return the tile with the tokens of a slot loaded again: they would take registers all through the loop."""
    if slot is not None:
        m, m_mask = slot_tokens(slot, tile.m.shape[0])
        tile = OutputTile(m, tile.n, m_mask, tile.n_mask, tile.M, tile.N)
    return tile


@triton.jit
def slot_tokens(slot, BLOCK_M: tl.constexpr):
    """Return the rows of quantized values of a slot, 0 in place of those that there are not, and which there are.

    The compiler would merge two loads if they were not volatile.
    """
    index = tl.arange(0, BLOCK_M)
    routed = tl.load(slot.rows_ptr + index // slot.PER_ROW, volatile=True)
    mask = routed < slot.count
    return tl.where(mask, routed // slot.chosen * slot.PER_ROW + index % slot.PER_ROW, 0), mask


@triton.jit
def _multiply(
    total,
    weight_rows,
    values_rows,
    words,
    N,
    step,
    WEIGHT_BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
):
    """Add weights @ values over BLOCK_K features to total, in runs whose first half is in the low nibbles."""
    HALF: tl.constexpr = RUN // 2
    if WEIGHT_BITS == 8:
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        total = tl.dot(tl.load(weight_rows + k[None, :]), tl.load(values_rows + k[:, None]), total, out_dtype=tl.int32)
    elif words is None:
        byte = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
        k = byte // HALF * RUN + byte % HALF
        low, high = unpack_nibbles(tl.load(weight_rows + byte[None, :]), True)
        total = tl.dot(low, tl.load(values_rows + k[:, None]), total, out_dtype=tl.int32)
        total = tl.dot(high, tl.load(values_rows + (k + HALF)[:, None]), total, out_dtype=tl.int32)
    else:
        for part in tl.static_range(BLOCK_K // RUN):
            run = step * (BLOCK_K // RUN) + part
            byte = tl.arange(0, HALF)
            word = tl.load(words + run.to(tl.int64) * N)
            low, high = multiply_nibbles(tl.load(weight_rows + (run * HALF + byte)[None, :]), word)
            k = run * RUN + byte
            total = tl.dot(low, tl.load(values_rows + k[:, None]), total, out_dtype=tl.int32)
            total = tl.dot(high, tl.load(values_rows + (k + HALF)[:, None]), total, out_dtype=tl.int32)
    return total


@triton.jit(do_not_specialize=["M", "features"])
def split_k_reduce_kernel(
    partial_ptr,
    scale_ptr,
    zp_offset_ptr,
    sums_ptr,
    weight_ptr,
    weight_scale_ptr,
    word_ptr,
    weight_zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    weight_stride,
    features,
    SEGMENTS: tl.constexpr,
    SPLITS: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    INT16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up partial int32 [splits, M, N] to out [M, N], with INT16 [M / 2, N]; other arguments are `gemm_kernel`'s."""
    first = tl.program_id(1) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    mask = m_mask[:, None] & n_mask[None, :]
    rows = partial_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tile = OutputTile(m, n, m_mask, n_mask, M, N)
    scales = Scales(scale_ptr, zp_offset_ptr, sums_ptr, weight_sums(weight_ptr, N, weight_stride), weight_zero_ptr)
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for segment in tl.static_range(SEGMENTS):
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for split in tl.static_range(SPLITS):
            total += tl.load(rows + (segment * SPLITS + split) * M.to(tl.int64) * N, mask, other=0)
        out += scale_segment(total, segment, tile, scales, features, WEIGHT_BITS, word_ptr is not None)
    ROWS: tl.constexpr = 2 if INT16 else 1
    row = first // ROWS + tl.arange(0, BLOCK_M // ROWS)
    finish(out, row, row < M // ROWS, tile, weight_scale_ptr, bias_ptr, out_ptr, INT16)


@triton.jit
def load_row(ptr, row, size, index, mask):
    """Load entries `index` of a row of ptr [rows, size]."""
    return tl.load(ptr + row * size + index, mask=mask, other=0)


@triton.jit
def weight_sums(weight_ptr, N, weight_stride):
    """Return a pointer to the sums of a weight from `prepare_linear`, which lie behind its rows."""
    return (weight_ptr + N.to(tl.int64) * weight_stride).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def scale_segment(total, segment, tile, scales, features, WEIGHT_BITS: tl.constexpr, GROUPED: tl.constexpr):
    """Turn total = sum value * weight of a segment into scale * sum (value - zp_offset) * (weight - zero), float32.

    total [tokens, channels] int32, with 4-bit weights that were not multiplied NIBBLE_FACTOR times that. The difference
    is zp_offset * sum(weight) and zero * sum(value - zp_offset), whose sums are kept with weights and with values.
    """
    UNIT: tl.constexpr = NIBBLE_FACTOR if WEIGHT_BITS == 4 and not GROUPED else 1
    if scales.zp_offset_ptr is not None:
        zp_offset = load_row(scales.zp_offset_ptr, segment, tile.M, tile.m, tile.m_mask) * UNIT
        total -= zp_offset[:, None] * load_row(scales.weight_sums_ptr, segment, tile.N, tile.n, tile.n_mask)[None, :]
    if scales.weight_zero_ptr is not None:
        zero = tl.load(scales.weight_zero_ptr + tile.n, tile.n_mask, other=0).to(tl.int32) - (1 << (WEIGHT_BITS - 1))
        sums = load_row(scales.sums_ptr, segment, tile.M, tile.m, tile.m_mask) * UNIT
        if scales.zp_offset_ptr is not None:
            sums -= zp_offset * features
        total -= sums[:, None] * zero[None, :]
    scale = load_row(scales.scale_ptr, segment, tile.M, tile.m, tile.m_mask)
    return total.to(tl.float32) * (scale * (1.0 / UNIT))[:, None]


@triton.jit
def finish(out, row, row_mask, tile, weight_scale_ptr, bias_ptr, out_ptr, INT16: tl.constexpr):
    """Scale out float32 [tokens, channels] per channel, add the bias, and store it in rows `row` of out_ptr.

    Operations round in the reference's order. With INT16 tokens 2i and 2i + 1 of `out` are the high and the low bytes
    of row[i], and are added.
    """
    out *= tl.load(weight_scale_ptr + tile.n, tile.n_mask, other=0)[None, :]
    if INT16:
        out = tl.sum(tl.reshape(out, (out.shape[0] // 2, 2, out.shape[1])), 1)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + tile.n, tile.n_mask, other=0).to(tl.float32)[None, :]
    target = row.to(tl.int64)[:, None] * tile.N + tile.n[None, :]
    out = narrow(out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + target, out, row_mask[:, None] & tile.n_mask[None, :])
