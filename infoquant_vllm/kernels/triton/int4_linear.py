"""Product of int8 activations with packed 4-bit or 8-bit weights, exact in int32 on the INT8 tensor cores.

Weights are the dot's first operand: unpacked in registers, they stay there (Hopper's wgmma reads them from
registers; as the second operand they would go back to shared memory first). The tile is [channels, tokens] for that.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.triton import configurations
from infoquant_vllm.kernels.triton.codes import Codes
from infoquant_vllm.kernels.triton.configurations import BAND, Tile, linear_tile, token_class
from infoquant_vllm.kernels.triton.epilogue import correct, finish, row, weight_sums
from infoquant_vllm.kernels.triton.nibbles import unpack_nibbles
from infoquant_vllm.kernels.triton.reduce_splits import reduce_splits
from infoquant_vllm.kernels.triton.weights import stored_layout, sums_dtype

# A sum that begins with _BIAS is the bits of a float32, _BIAS_VALUE plus the sum, as long as that is below 2^22: which
# it is with int8 codes, 4-bit weights less their zero points and 128 features, 128 * 15 * FACTOR * 128. On sm_80 that
# saves conversions from integers, which take eight times as long as additions there.
_BIAS = tl.constexpr(0x4B400000)
_BIAS_VALUE = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["M", "groups", "steps", "share", "features"])
def int4_linear_kernel(
    codes_ptr,
    scale_ptr,
    rest_ptr,
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
    share,
    codes_stride,
    weight_stride,
    features,
    GROUP_SIZE: tl.constexpr,
    INPUT_SPAN: tl.constexpr,
    WEIGHT_SPAN: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    SUM_BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BAND: tl.constexpr,
):
    """A tile of out = sum_g scale[m, g] * weight_scale[n, g] * sum_k (code - rest) * (weight - zero) + bias.

    codes [M, codes_stride] int8; scale [input groups, M] float32, rest alike int32 (None: zeros); sums [groups, M] of
    the codes; weight [N, weight_stride] bytes as `prepare_weight` lays them out, behind them sums of its codes
    [groups, N] of SUM_BITS; weight_scale, weight_zero [weight groups, N], each with None for what all have alike;
    bias [N]; out [M, N], with PAIRS (see `finish`) [M / 2, N].

    GROUP_SIZE 0: one group of `features`. A SPAN is the groups that share a scale, 0: all. A program does its share of
    the steps; with SPLIT that is not all, and out is [splits, M, N]: int32 sums of one group, float32 sums of more.
    """
    tile_n, tile_m = _tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), BAND)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n_mask, m_mask = n < N, m < M
    # Rows past the end are read from the start again, which costs no mask in the loop, and are not stored.
    weight_rows = weight_ptr.to(tl.pointer_type(tl.int8), bitcast=True) + (n % N).to(tl.int64)[:, None] * weight_stride
    codes_rows = codes_ptr + (m % M).to(tl.int64)[None, :] * codes_stride
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, steps)
    pointers = rest_ptr, sums_ptr, weight_sums(weight_ptr, N, weight_stride, SUM_BITS), weight_zero_ptr
    if GROUP_SIZE == 0:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for step in tl.range(first, last):
            total = _multiply(total, weight_rows, codes_rows, step, WEIGHT_BITS, BLOCK_K, CHUNK)
        out = tl.trans(total)
        if not SPLIT:
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
                exact = tl.trans(high if half else low)
                exact = correct(exact, group, input_group, weight_group, *where, *pointers, GROUP_SIZE, WEIGHT_BITS)
                term = exact.to(tl.float32, bitcast=True) - _BIAS_VALUE if BIASED else exact.to(tl.float32)
                if WEIGHT_SPAN != 0:
                    term *= row(weight_scale_ptr, weight_group, N, n, n_known)[None, :]
                out += term * row(scale_ptr, input_group, M, m, m_known)[:, None]
    if SPLIT:
        target = (tl.program_id(1) * M + m).to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_ptr + target, out, m_mask[:, None] & n_mask[None, :])
    else:
        first_row, ends = tile_m * BLOCK_M, (n_mask, M, N)
        tensors = weight_scale_ptr, bias_ptr, out_ptr
        finish(out, first_row, n, *ends, *tensors, BLOCK_M, WEIGHT_SPAN, WEIGHT_BITS, PAIRS)


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


class Plan(NamedTuple):
    """What a product's launches take beside tensors: the same for all tokens of a class."""

    tile: Tile
    programs: int
    """for all channels"""
    codes_stride: int
    partial: torch.dtype
    """of sums of a split product"""
    numbers: tuple[int, ...]
    """the kernel's arguments from N to `features`"""
    constants: dict[str, Any]
    reducing: dict[str, Any]
    """constants of `reduce_splits`"""


@cache
def plan(
    arch: int,
    tokens: int,
    size: int,
    sizes: tuple[int, int, int, int],
    has_rest: bool,
    pairs: bool,
    tile: Tile | None,
) -> Plan:
    """The plan of products of up to `tokens` rows, a class of theirs, with a weight of `size` bytes.

    sizes: channels, features, groups of the input, groups of the weight.
    """
    channels, features, input_groups, weight_groups = sizes
    groups = max(input_groups, weight_groups)
    bits, shape = stored_layout(size, channels, features, groups)
    tile = tile or linear_tile(arch, tokens, channels, shape)
    steps, stride = shape.steps(tile.block_k), shape.padded * bits // 8
    common = {
        "WEIGHT_SPAN": groups // weight_groups if weight_groups > 1 else 0,
        "WEIGHT_BITS": bits,
        "SUM_BITS": sums_dtype(shape, bits).itemsize * 8 if has_rest else 0,
        "PAIRS": pairs,
    }
    constants = {
        "GROUP_SIZE": shape.group_size,
        "INPUT_SPAN": groups // input_groups if input_groups > 1 else 0,
        "SPLIT": tile.splits > 1,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "CHUNK": shape.chunk,
        "BAND": BAND,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": False,
    }
    return Plan(
        tile,
        triton.cdiv(channels, tile.block_n),
        shape.padded,
        torch.float32 if shape.group_size else torch.int32,
        (channels, groups, steps, triton.cdiv(steps, tile.splits), shape.padded, stride, features),
        constants | common,
        common | {"GROUPED": shape.group_size > 0},
    )


def int4_linear(
    codes: Codes,
    features: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
    pairs: bool = False,
) -> torch.Tensor:
    """Quantized rows times a weight from `prepare_weight`: [tokens, N] in `dtype`.

    weight_scale [N, weight groups] float32 and weight_zero alike uint8 (None: signed codes) from `prepare_grid`; bias
    [N]. The result is the reference's bit by bit, but for the last bits of sums over groups where a few tokens'
    features are split among programs. tile: another than the table's. pairs: a token has a row of high and a row of
    low bytes, whose products are added in float32.
    """
    rows, channels = len(codes.values), len(weight_scale)
    sizes = channels, features, len(codes.scale), weight_scale.shape[1]
    arch = configurations.architecture(weight.device)
    made = plan(arch, token_class(rows), weight.numel(), sizes, codes.rest is not None, pairs, tile)
    out = torch.empty(rows // 2 if pairs else rows, channels, dtype=dtype, device=weight.device)
    assert codes.values.shape[1] == made.codes_stride
    assert all(grid is None or grid.stride(0) == 1 for grid in (weight_scale, weight_zero)), "not from prepare_grid"
    if rows == 0:
        return out
    splits, partial = made.tile.splits, out
    if splits > 1:
        partial = torch.empty((splits, rows, channels), dtype=made.partial, device=weight.device)
    tensors = weight, weight_scale, weight_zero, bias
    int4_linear_kernel[made.programs * -(-rows // made.tile.block_m), splits](
        codes.values, *codes[1:], *tensors, partial, rows, *made.numbers, **made.constants
    )
    if splits > 1:
        reduce_splits(partial, codes, *tensors, out, made.numbers[-2:], made.reducing)
    return out
