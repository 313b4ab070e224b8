"""GEMM of int8 activations and packed 4-bit or 8-bit weights, exact in int32 on the INT8 tensor cores.

Weights are the dot's first operand: unpacked in registers, they stay there (Hopper's wgmma reads them from registers;
as the second operand they would go back to shared memory first). The accumulator is [channels, tokens] for that.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.common import MAGIC, MAGIC_BITS, NIBBLE_FACTOR, narrow, unpack_nibbles


class OutputTile(NamedTuple):
    """The tokens m and channels n of a program, which of them are in bounds, and how many there are."""

    m: Any
    n: Any
    m_mask: Any
    n_mask: Any
    M: Any
    N: Any


class ZeroPoints(NamedTuple):
    """Pointers to what `correct_zero_points` needs; None: no such zero points."""

    zp_offset_ptr: Any
    sums_ptr: Any
    weight_sums_ptr: Any
    weight_zero_ptr: Any


@triton.jit(do_not_specialize=["M", "groups", "steps", "split_steps", "features"])
def gemm_kernel(
    codes_ptr,
    scale_ptr,
    zp_offset_ptr,
    sums_ptr,
    weight_ptr,
    weight_scale_ptr,
    weight_zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    groups,
    steps,
    split_steps,
    codes_stride,
    weight_stride,
    features,
    GROUP_SIZE: tl.constexpr,
    INPUT_SPAN: tl.constexpr,
    WEIGHT_SPAN: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    SUM_BITS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    INT16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RUN: tl.constexpr,
    BAND: tl.constexpr,
):
    """Compute a tile of sum_g scale[m, g] * weight_scale[n, g] * sum_k (code - zp_offset) * (weight - zero) + bias.

    codes [M, codes_stride] int8; scale [input groups, M] float32, zp_offset alike int32 (None: zeros); sums [groups, M]
    of the codes; weight [N, weight_stride] bytes as `prepare_weight` lays them out, behind them sums of its codes
    [groups, N] of SUM_BITS; weight_scale, weight_zero [weight groups, N] (None: symmetric); bias [N] or None; out
    [M, N], with INT16 (see `finish`) [M / 2, N].

    GROUP_SIZE 0: one group of `features`. A SPAN is how many groups share a scale, 0: all. A program does split_steps
    of the steps; with SPLIT_K that is not all, and out is [splits, M, N]: int32 sums of one group, float32 of more.
    """
    tile_n, tile_m = _tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), BAND)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n_mask, m_mask = n < N, m < M
    # Rows past the end wrap around, which costs no mask in the loop, and are not stored.
    weight_rows = weight_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + (n % N).to(tl.int64)[:, None] * weight_stride
    codes_rows = codes_ptr + (m % M).to(tl.int64)[None, :] * codes_stride
    first = tl.program_id(1) * split_steps
    last = tl.minimum(first + split_steps, steps)
    zeros = ZeroPoints(zp_offset_ptr, sums_ptr, weight_sums(weight_ptr, N, weight_stride, SUM_BITS), weight_zero_ptr)
    if GROUP_SIZE == 0:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for step in tl.range(first, last):
            total = _multiply(total, weight_rows, codes_rows, step, WEIGHT_BITS, BLOCK_K, RUN)
        out = tl.trans(total)
        if not SPLIT_K:
            tile = OutputTile(m, n, m_mask, n_mask, M, N)
            out = correct_zero_points(out, 0, 0, 0, tile, zeros, features, WEIGHT_BITS)
            out = out.to(tl.float32) * tl.load(scale_ptr + m, m_mask, other=0)[:, None]
    else:
        out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        HALVES: tl.constexpr = 8 // WEIGHT_BITS
        # Sums that begin with MAGIC_BITS are the bits of a float32, MAGIC plus the sum, while that is below 2^22: it is
        # with int8 codes, 4-bit weights and 128 features (128 * 15 * NIBBLE_FACTOR * 128). That saves conversions
        # from int32, which take eight times as long as additions on sm_80.
        BIASED: tl.constexpr = zp_offset_ptr is None and WEIGHT_BITS == 4 and GROUP_SIZE <= 128
        for step in tl.range(first, last):
            low, high = _multiply_groups(
                weight_rows, codes_rows, step, BLOCK_N, BLOCK_M, WEIGHT_BITS, GROUP_SIZE, BLOCK_K, BIASED
            )
            for half in tl.static_range(HALVES):
                group = step * HALVES + half
                input_group, weight_group = _shared(group, INPUT_SPAN), _shared(group, WEIGHT_SPAN)
                # An odd number of 4-bit groups leaves a last half of zeros, which has no scale.
                is_group = group < groups
                tile = OutputTile(m, n, m < tl.where(is_group, M, 0), n < tl.where(is_group, N, 0), M, N)
                exact = tl.trans(high if half else low)
                exact = correct_zero_points(
                    exact, group, input_group, weight_group, tile, zeros, GROUP_SIZE, WEIGHT_BITS
                )
                term = exact.to(tl.float32, bitcast=True) - MAGIC if BIASED else exact.to(tl.float32)
                if WEIGHT_SPAN != 0:
                    term *= load_row(weight_scale_ptr, weight_group, N, n, tile.n_mask)[None, :]
                out += term * load_row(scale_ptr, input_group, M, m, tile.m_mask)[:, None]
    if SPLIT_K:
        target = (tl.program_id(1) * M + m).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_ptr + target, out, m_mask[:, None] & n_mask[None, :])
    else:
        tile = OutputTile(m, n, m_mask, n_mask, M, N)
        finish(
            out, tile_m * BLOCK_M, tile, weight_scale_ptr, bias_ptr, out_ptr, BLOCK_M, WEIGHT_SPAN, WEIGHT_BITS, INT16
        )


@triton.jit
def _tile(index, tiles_n, tiles_m, BAND: tl.constexpr):
    """Order tiles in bands of BAND rows of tokens, so that concurrent programs share operands in the L2 cache."""
    per_band = BAND * tiles_n
    first = index // per_band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    return index % per_band // height, first + index % per_band % height


@triton.jit
def _shared(group, SPAN: tl.constexpr):
    return group // SPAN if SPAN != 0 else 0


@triton.jit
def _multiply(
    total, weight_rows, codes_rows, step, WEIGHT_BITS: tl.constexpr, BLOCK_K: tl.constexpr, RUN: tl.constexpr
):
    """Add weights @ codes over BLOCK_K features to total, in runs whose first half is in the low nibbles."""
    if WEIGHT_BITS == 8:
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        return tl.dot(tl.load(weight_rows + k[None, :]), tl.load(codes_rows + k[:, None]), total, out_dtype=tl.int32)
    HALF: tl.constexpr = RUN // 2
    byte = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    k = byte // HALF * RUN + byte % HALF
    low, high = unpack_nibbles(tl.load(weight_rows + byte[None, :]), True)
    total = tl.dot(low, tl.load(codes_rows + k[:, None]), total, out_dtype=tl.int32)
    return tl.dot(high, tl.load(codes_rows + (k + HALF)[:, None]), total, out_dtype=tl.int32)


@triton.jit
def _multiply_groups(
    weight_rows,
    codes_rows,
    step,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Multiply the two groups in the low and the high nibbles; 8-bit weights have one group, returned twice."""
    low = tl.full((BLOCK_N, BLOCK_M), MAGIC_BITS if BIASED else 0, tl.int32)
    high = low
    for part in tl.static_range(GROUP_SIZE // BLOCK_K):
        byte = step * GROUP_SIZE + part * BLOCK_K + tl.arange(0, BLOCK_K)
        packed = tl.load(weight_rows + byte[None, :])
        if WEIGHT_BITS == 8:
            low = tl.dot(packed, tl.load(codes_rows + byte[:, None]), low, out_dtype=tl.int32)
            high = low
        else:
            k = byte + step * GROUP_SIZE
            weight_low, weight_high = unpack_nibbles(packed, True)
            low = tl.dot(weight_low, tl.load(codes_rows + k[:, None]), low, out_dtype=tl.int32)
            high = tl.dot(weight_high, tl.load(codes_rows + (k + GROUP_SIZE)[:, None]), high, out_dtype=tl.int32)
    return low, high


@triton.jit(do_not_specialize=["M", "features"])
def split_k_reduce_kernel(
    partial_ptr,
    scale_ptr,
    zp_offset_ptr,
    sums_ptr,
    weight_ptr,
    weight_scale_ptr,
    weight_zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    weight_stride,
    features,
    GROUPED: tl.constexpr,
    WEIGHT_SPAN: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    SUM_BITS: tl.constexpr,
    INT16: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up partial [SPLITS, M, N] to out [M, N], with INT16 [M / 2, N]; the other arguments are `gemm_kernel`'s.

    Sums of one group are integers, so that the order of additions does not matter; those of more are float32 and differ
    from an unsplit GEMM's in last bits, the same ones in every run.
    """
    first = tl.program_id(1) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    mask = m_mask[:, None] & n_mask[None, :]
    offset = m.to(tl.int64)[:, None] * N + n[None, :]
    out = tl.load(partial_ptr + offset, mask, other=0)
    for split in tl.static_range(1, SPLITS):
        out += tl.load(partial_ptr + split * M.to(tl.int64) * N + offset, mask, other=0)
    tile = OutputTile(m, n, m_mask, n_mask, M, N)
    if not GROUPED:
        sums = weight_sums(weight_ptr, N, weight_stride, SUM_BITS)
        zeros = ZeroPoints(zp_offset_ptr, sums_ptr, sums, weight_zero_ptr)
        out = correct_zero_points(out, 0, 0, 0, tile, zeros, features, WEIGHT_BITS)
        out = out.to(tl.float32) * tl.load(scale_ptr + m, m_mask, other=0)[:, None]
    finish(out, first, tile, weight_scale_ptr, bias_ptr, out_ptr, BLOCK_M, WEIGHT_SPAN, WEIGHT_BITS, INT16)


@triton.jit
def load_row(ptr, group, size, index, mask):
    """Load entries `index` of row `group` of ptr [groups, size]."""
    return tl.load(ptr + group * size + index, mask=mask, other=0)


@triton.jit
def weight_sums(weight_ptr, N, weight_stride, SUM_BITS: tl.constexpr):
    """Return a pointer to the sums of a weight from `prepare_weight`, which lie behind its rows."""
    ptr = weight_ptr + N.to(tl.int64) * weight_stride
    return ptr.to(tl.pointer_type(tl.int16 if SUM_BITS == 16 else tl.int32), bitcast=True)


@triton.jit
def correct_zero_points(total, group, input_group, weight_group, tile, zeros, GROUP_SIZE, WEIGHT_BITS: tl.constexpr):
    """Turn total = sum code * weight of a group into sum (code - zp_offset) * (weight - zero).

    total [tokens, channels] int32, like the result times NIBBLE_FACTOR with 4-bit weights. The difference is
    zp_offset * sum(weight) and zero * sum(code - zp_offset), whose sums are kept with the weights and with the codes.
    """
    UNIT: tl.constexpr = NIBBLE_FACTOR if WEIGHT_BITS == 4 else 1
    if zeros.zp_offset_ptr is not None:
        zp_offset = load_row(zeros.zp_offset_ptr, input_group, tile.M, tile.m, tile.m_mask) * UNIT
        weights = load_row(zeros.weight_sums_ptr, group, tile.N, tile.n, tile.n_mask)
        total -= zp_offset[:, None] * weights.to(tl.int32)[None, :]
    if zeros.weight_zero_ptr is not None:
        zero = load_row(zeros.weight_zero_ptr, weight_group, tile.N, tile.n, tile.n_mask)
        zero = zero.to(tl.int32) - (1 << (WEIGHT_BITS - 1))
        sums = load_row(zeros.sums_ptr, group, tile.M, tile.m, tile.m_mask) * UNIT
        if zeros.zp_offset_ptr is not None:
            sums -= zp_offset * GROUP_SIZE
        total -= sums[:, None] * zero[None, :]
    return total


@triton.jit
def finish(
    out,
    first,
    tile,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    BLOCK_M: tl.constexpr,
    WEIGHT_SPAN: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    INT16: tl.constexpr,
):
    """Scale out float32 [BLOCK_M rows from `first` on, channels] per channel, add the bias, and store it.

    Operations round in the reference's order. With INT16 rows 2t and 2t + 1 are the high and the low bytes of token t,
    and are added. Grouped weights (WEIGHT_SPAN > 0) were scaled before.
    """
    if WEIGHT_SPAN == 0:
        out *= tl.load(weight_scale_ptr + tile.n, tile.n_mask, other=0)[None, :]
    if WEIGHT_BITS == 4:
        out *= 1.0 / NIBBLE_FACTOR
    ROWS: tl.constexpr = 2 if INT16 else 1
    if INT16:
        out = tl.sum(tl.reshape(out, (BLOCK_M // 2, 2, out.shape[1])), 1)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + tile.n, tile.n_mask, other=0).to(tl.float32)[None, :]
    token = first // ROWS + tl.arange(0, BLOCK_M // ROWS)
    target = token.to(tl.int64)[:, None] * tile.N + tile.n[None, :]
    out = narrow(out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + target, out, (token < tile.M // ROWS)[:, None] & tile.n_mask[None, :])
