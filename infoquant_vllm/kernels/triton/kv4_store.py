"""Keys and values into the quantized cache; semantics and layout: kernels/reference/kv_cache.py."""

import math

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.operands import KVCalibration, KVScheme
from infoquant_vllm.kernels.triton.extremes import amax, amin, maximum, minimum
from infoquant_vllm.kernels.triton.head_hadamard import dense_factor, hadamard_rows, hadamard_sizes

TOKENS = 8  # of a program, all of one kv-head
MAGIC = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds to whole numbers, ties to even


@triton.jit
def quantize(low, high, clip_ptr, LARGEST: tl.constexpr):
    """Scale and zero, float16 [rows], of rows whose features lie between low <= 0 and high >= 0; NaN of such rows."""
    low, high = low * tl.load(clip_ptr), high * tl.load(clip_ptr + 1)
    scale = tl.div_rn(high - low, tl.full(low.shape, LARGEST, tl.float32))
    scale = minimum(maximum(scale, 2.0**-20), 65504.0).to(tl.float16)
    return scale, minimum(maximum(low, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def to_codes(x, scale, zero, LARGEST: tl.constexpr):
    """Codes int32 [rows, features] of x: (x - zero) / scale, rounded, within 0 .. LARGEST."""
    steps = tl.div_rn(x - zero.to(tl.float32)[:, None], tl.broadcast_to(scale.to(tl.float32)[:, None], x.shape))
    steps = tl.minimum(tl.maximum(steps, -1.0), LARGEST + 1.0)
    return tl.minimum(tl.maximum((steps + MAGIC) - MAGIC, 0.0), 1.0 * LARGEST).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens"])
def kv4_store_kernel(
    key_ptr,
    value_ptr,
    cache_ptr,
    slots_ptr,
    key_clip_ptr,
    value_clip_ptr,
    key_offset_ptr,
    factor_ptr,
    norm,
    num_tokens,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    cache_block_stride,
    cache_head_stride,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    LOG_N: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HADAMARD: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Codes, scales and zeros of TOKENS tokens of one kv-head, each to its own place in a page.

    A code is clamp(round((x - zero) / scale)) with zero = clip_0 * min(x, 0) and scale = (clip_1 * max(x, 0) - zero)
    / (2^bits - 1); keys are first rotated by a Hadamard matrix (Ashkboos et al., QuaRot, 2024, section 4).
    """
    head = tl.program_id(1)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots = tl.load(slots_ptr + rows, mask=rows < num_tokens, other=-1).to(tl.int64)
    written = slots >= 0
    rows = rows.to(tl.int64)
    lane = slots % 16
    KEY_BYTES: tl.constexpr = 2 * HEAD * KEY_BITS
    VALUE_BYTES: tl.constexpr = 2 * HEAD * VALUE_BITS
    TILE_BYTES: tl.constexpr = KEY_BYTES + VALUE_BYTES + 128
    tile_ptr = cache_ptr + slots // BLOCK * cache_block_stride + head.to(tl.int64) * cache_head_stride
    tile_ptr += slots % BLOCK // 16 * TILE_BYTES

    features = tl.arange(0, SIZE)
    there = written[:, None] & (features < HEAD)[None, :]
    at = rows[:, None] * key_token_stride + head * key_head_stride + features[None, :]
    key = tl.load(key_ptr + at, mask=there, other=0.0).to(tl.float32)
    if HAS_OFFSET:
        key -= tl.load(key_offset_ptr + head * HEAD + features, mask=features < HEAD, other=0.0)[None, :]
    if HADAMARD:
        key = hadamard_rows(key, factor_ptr, norm, TOKENS, SIZE, ORDER, LOG_N)
    low, high = minimum(amin(key, 1), 0.0), maximum(amax(key, 1), 0.0)
    key_scale, key_zero = quantize(low, high, key_clip_ptr + 2 * head, 2**KEY_BITS - 1)
    codes = to_codes(key, key_scale, key_zero, 2**KEY_BITS - 1)
    if KEY_BITS == 4:
        PAIRS: tl.constexpr = SIZE // 2
        codes = tl.permute(tl.reshape(codes, [TOKENS, SIZE // 8, 2, 4]), (0, 1, 3, 2))
        first, second = tl.split(codes)
        codes = tl.reshape(first | (second << 4), [TOKENS, PAIRS])
        place = tl.arange(0, PAIRS)
        there = written[:, None] & (place < HEAD // 2)[None, :]
    else:
        place = features
    at = (place // 4 * 64 + place % 4)[None, :] + lane[:, None] * 4
    tl.store(tile_ptr[:, None] + at, codes.to(tl.uint8), mask=there)

    # A value's byte holds features half a head apart, so halves are read apart: of 8 bits the second is empty.
    STORED: tl.constexpr = HEAD * VALUE_BITS // 8
    PADDED: tl.constexpr = SIZE * VALUE_BITS // 8
    place = tl.arange(0, PADDED)
    there = written[:, None] & (place < STORED)[None, :]
    at = rows[:, None] * value_token_stride + head * value_head_stride + place[None, :]
    value = tl.load(value_ptr + at, mask=there, other=0.0).to(tl.float32)
    low, high = minimum(amin(value, 1), 0.0), maximum(amax(value, 1), 0.0)
    if VALUE_BITS == 4:
        upper = tl.load(value_ptr + at + STORED, mask=there, other=0.0).to(tl.float32)
        low, high = minimum(low, amin(upper, 1)), maximum(high, amax(upper, 1))
    value_scale, value_zero = quantize(low, high, value_clip_ptr + 2 * head, 2**VALUE_BITS - 1)
    codes = to_codes(value, value_scale, value_zero, 2**VALUE_BITS - 1)
    if VALUE_BITS == 4:
        codes |= to_codes(upper, value_scale, value_zero, 2**VALUE_BITS - 1) << 4
    at = (lane // 4 * (4 * STORED) + lane % 4)[:, None] + 4 * place[None, :]
    tl.store(tile_ptr[:, None] + KEY_BYTES + at, codes.to(tl.uint8), mask=there)

    numbers = (tile_ptr + KEY_BYTES + VALUE_BYTES).to(tl.pointer_type(tl.float16), bitcast=True) + lane
    tl.store(numbers, key_scale, mask=written)
    tl.store(numbers + 16, key_zero, mask=written)
    tl.store(numbers + 32, value_scale, mask=written)
    tl.store(numbers + 48, value_zero, mask=written)


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    calibration: KVCalibration,
    scheme: KVScheme,
) -> None:
    """As the reference, of [tokens, kv_heads, head_size] with any distance between tokens and heads."""
    key_clip_ratio, value_clip_ratio, key_mean = calibration
    num_bits, hadamard = scheme
    tokens, (_, kv_heads, size) = len(slots), key.shape
    assert key.stride(2) == value.stride(2) == 1, "features of a head must be side by side"
    assert cache.stride()[2:] == (cache.shape[3], 1), "cells of a page must be side by side"
    if tokens == 0:
        return
    kv4_store_kernel[(triton.cdiv(tokens, TOKENS), kv_heads)](
        key,
        value,
        cache,
        slots,
        key_clip_ratio,
        value_clip_ratio,
        key_mean,
        dense_factor(size, key.device) if hadamard else None,
        1 / math.sqrt(size),
        tokens,
        *key.stride()[:2],
        *value.stride()[:2],
        *cache.stride()[:2],
        **store_constants(cache.shape[2], size, num_bits, key_mean is not None, hadamard),
    )


def store_constants(
    block: int, size: int, num_bits: tuple[int, int], has_offset: bool, hadamard: bool
) -> dict[str, int | bool]:
    """What `kv4_store_kernel` is compiled for, its launch options included."""
    order, log_n = hadamard_sizes(size, hadamard)
    return {
        "BLOCK": block,
        "HEAD": size,
        "SIZE": triton.next_power_of_2(size),
        "ORDER": order,
        "LOG_N": log_n,
        "HAS_OFFSET": has_offset,
        "HADAMARD": hadamard,
        "KEY_BITS": num_bits[0],
        "VALUE_BITS": num_bits[1],
        "TOKENS": TOKENS,
        "num_warps": 4,
        "enable_fp_fusion": False,  # codes are the reference's: every operation rounds
    }
