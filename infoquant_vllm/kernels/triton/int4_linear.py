"""Product of int8 activations with packed 4-bit or 8-bit weights, exact in int32 on the INT8 tensor cores.

Weights are the dot's first operand: unpacked in registers, they stay there (Hopper's wgmma reads them from
registers; as the second operand they would go back to shared memory first). The tile is [channels, tokens] for that.
"""

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.triton import configurations
from infoquant_vllm.kernels.triton.codes import Codes
from infoquant_vllm.kernels.triton.configurations import BAND, Tile, linear_tile
from infoquant_vllm.kernels.triton.epilogue import correct, finish, row
from infoquant_vllm.kernels.triton.nibbles import unpack_nibbles
from infoquant_vllm.kernels.triton.reduce_splits import reduce_splits
from infoquant_vllm.kernels.triton.rounding import narrow
from infoquant_vllm.kernels.triton.weights import layout, num_bits_of, split_weight

# A sum that begins with _BIAS is the bits of a float32, _BIAS_VALUE plus the sum, as long as that is below 2^22: which
# it is with int8 codes, 4-bit weights less their zero points and 128 features, 128 * 15 * FACTOR * 128. On sm_80 that
# saves conversions from integers, which take eight times as long as additions there.
_BIAS = tl.constexpr(0x4B400000)
_BIAS_VALUE = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["M", "groups", "steps"])
def int4_linear_kernel(
    codes_ptr,
    scale_ptr,
    rest_ptr,
    sums_ptr,
    weight_ptr,
    weight_sums_ptr,
    weight_scale_ptr,
    weight_zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    groups,
    steps,
    codes_stride,
    weight_stride,
    features,
    GROUP_SIZE: tl.constexpr,
    INPUT_SPAN: tl.constexpr,
    WEIGHT_SPAN: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BAND: tl.constexpr,
):
    """A tile of out = sum_g scale[m, g] * weight_scale[n, g] * sum_k (code - rest) * (weight - zero) + bias.

    codes [M, codes_stride] int8; scale [input groups, M] float32, rest alike int32 (None: zeros); sums [groups, M] of
    the codes; weight [N, weight_stride] bytes as `prepare_weight` lays them out, weight_sums [groups, N] of its codes;
    weight_scale, weight_zero [weight groups, N], each with None for what all have alike; bias [N]; out [M, N].

    GROUP_SIZE 0: one group of `features`. A SPAN is the groups that share a scale, 0: all. With SPLITS > 1 a program
    does its share of the steps, and out is [SPLITS, M, N]: int32 sums of one group, float32 sums of more.
    """
    tile_n, tile_m = _tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), BAND)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n_mask, m_mask = n < N, m < M
    # Rows past the end are read from the start again, which costs no mask in the loop, and are not stored.
    weight_rows = weight_ptr + (n % N).to(tl.int64)[:, None] * weight_stride
    codes_rows = codes_ptr + (m % M).to(tl.int64)[None, :] * codes_stride
    share = tl.cdiv(steps, SPLITS)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, steps)
    if GROUP_SIZE == 0:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for step in tl.range(first, last):
            total = _multiply(total, weight_rows, codes_rows, step, WEIGHT_BITS, BLOCK_K, CHUNK)
        out = tl.trans(total)
        if SPLITS == 1:
            pointers = rest_ptr, sums_ptr, weight_sums_ptr, weight_zero_ptr
            out = correct(out, 0, 0, 0, m, n, m_mask, n_mask, M, N, *pointers, features, WEIGHT_BITS)
            out = out.to(tl.float32) * tl.load(scale_ptr + m, m_mask, other=0)[:, None]
    else:
        out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        HALVES: tl.constexpr = 8 // WEIGHT_BITS
        BIASED: tl.constexpr = rest_ptr is None and WEIGHT_BITS == 4 and GROUP_SIZE <= 128
        for step in tl.range(first, last):
            low, high = _group_products(
                weight_rows, codes_rows, step, BLOCK_N, BLOCK_M, WEIGHT_BITS, GROUP_SIZE, BLOCK_K, BIASED
            )
            for half in tl.static_range(HALVES):
                group = step * HALVES + half
                input_group, weight_group = _shared(group, INPUT_SPAN), _shared(group, WEIGHT_SPAN)
                # An odd number of 4-bit groups leaves a last half of zeros, which has no scale.
                is_group = group < groups
                m_known, n_known = m < tl.where(is_group, M, 0), n < tl.where(is_group, N, 0)
                where = m, n, m_known, n_known, M, N
                pointers = rest_ptr, sums_ptr, weight_sums_ptr, weight_zero_ptr
                exact = tl.trans(high if half else low)
                exact = correct(exact, group, input_group, weight_group, *where, *pointers, GROUP_SIZE, WEIGHT_BITS)
                term = exact.to(tl.float32, bitcast=True) - _BIAS_VALUE if BIASED else exact.to(tl.float32)
                if WEIGHT_SPAN != 0:
                    term *= row(weight_scale_ptr, weight_group, N, n, n_known)[None, :]
                out += term * row(scale_ptr, input_group, M, m, m_known)[:, None]
    if SPLITS == 1:
        out = finish(out, n, n_mask, weight_scale_ptr, bias_ptr, WEIGHT_SPAN, WEIGHT_BITS)
    target = (tl.program_id(1) * M + m).to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + target, narrow(out, out_ptr.dtype.element_ty), m_mask[:, None] & n_mask[None, :])


@triton.jit
def _tile(index, tiles_n, tiles_m, BAND: tl.constexpr):
    """Tiles in bands of BAND rows of tokens, so that programs of one time share weights and codes in the L2 cache."""
    per_band = BAND * tiles_n
    first = index // per_band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    return index % per_band // height, first + index % per_band % height


@triton.jit
def _shared(group, SPAN: tl.constexpr):
    return group // SPAN if SPAN != 0 else 0


@triton.jit
def _multiply(
    total, weight_rows, codes_rows, step, WEIGHT_BITS: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr
):
    """total + weights @ codes over BLOCK_K features, in chunks whose first half is in the low nibbles."""
    if WEIGHT_BITS == 8:
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        return tl.dot(tl.load(weight_rows + k[None, :]), tl.load(codes_rows + k[:, None]), total, out_dtype=tl.int32)
    HALF: tl.constexpr = CHUNK // 2
    byte = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    k = byte // HALF * CHUNK + byte % HALF
    low, high = unpack_nibbles(tl.load(weight_rows + byte[None, :]))
    total = tl.dot(low, tl.load(codes_rows + k[:, None]), total, out_dtype=tl.int32)
    return tl.dot(high, tl.load(codes_rows + (k + HALF)[:, None]), total, out_dtype=tl.int32)


@triton.jit
def _group_products(
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
    """Products of the two groups in the low and the high nibbles; of 8-bit weights those of one group, twice."""
    low = tl.full((BLOCK_N, BLOCK_M), _BIAS if BIASED else 0, tl.int32)
    high = low
    for part in tl.static_range(GROUP_SIZE // BLOCK_K):
        byte = step * GROUP_SIZE + part * BLOCK_K + tl.arange(0, BLOCK_K)
        packed = tl.load(weight_rows + byte[None, :])
        if WEIGHT_BITS == 8:
            low = tl.dot(packed, tl.load(codes_rows + byte[:, None]), low, out_dtype=tl.int32)
            high = low
        else:
            k = byte + step * GROUP_SIZE
            weight_low, weight_high = unpack_nibbles(packed)
            low = tl.dot(weight_low, tl.load(codes_rows + k[:, None]), low, out_dtype=tl.int32)
            high = tl.dot(weight_high, tl.load(codes_rows + (k + GROUP_SIZE)[:, None]), high, out_dtype=tl.int32)
    return low, high


def int4_linear(
    codes: Codes,
    features: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Quantised rows times a weight from `prepare_weight`: [tokens, N] in `dtype`.

    weight_scale [N, weight groups] float32 and weight_zero alike uint8 (None: signed codes) from `prepare_grid`; bias
    [N]. The result is the reference's bit by bit, but for the last bits of sums over groups where a few tokens'
    features are split among programs. tile: another than the table's.
    """
    tokens, channels = codes.values.shape[0], weight_scale.shape[0]
    input_groups, weight_groups = codes.scale.shape[0], weight_scale.shape[1]
    groups = max(input_groups, weight_groups)
    bits = num_bits_of(weight, channels, features, groups)
    shape = layout(features, groups, bits)
    rows, weight_sums = split_weight(weight, channels, shape, bits)
    out = torch.empty(tokens, channels, dtype=dtype, device=weight.device)
    assert codes.values.shape == (tokens, shape.padded)
    assert all(grid is None or grid.stride(0) == 1 for grid in (weight_scale, weight_zero)), "not from prepare_grid"
    if tokens == 0:
        return out
    corrected = codes.rest is not None or weight_zero is not None
    tile = tile or linear_tile(configurations.architecture(weight.device), tokens, channels, shape, corrected)
    grids = weight_sums, weight_scale, weight_zero, bias
    constants = {"WEIGHT_SPAN": groups // weight_groups if weight_groups > 1 else 0, "WEIGHT_BITS": bits}
    partial = out
    if tile.splits > 1:
        sums = torch.float32 if shape.group_size else torch.int32
        partial = torch.empty((tile.splits, tokens, channels), dtype=sums, device=weight.device)
    grid = (triton.cdiv(channels, tile.block_n) * triton.cdiv(tokens, tile.block_m), tile.splits)
    int4_linear_kernel[grid](
        codes.values,
        *codes[1:],
        rows,
        *grids,
        partial,
        tokens,
        channels,
        groups,
        shape.steps(tile.block_k),
        shape.padded,
        rows.shape[1],
        features,
        GROUP_SIZE=shape.group_size,
        INPUT_SPAN=groups // input_groups if input_groups > 1 else 0,
        SPLITS=tile.splits,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        CHUNK=shape.chunk,
        BAND=BAND,
        **constants,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    if tile.splits > 1:
        reduce_splits(partial, codes, features, *grids, out, constants)
    return out
