"""Quantize keys and values into the cache; semantics and layout: kernels/torch/kv_cache.py."""

import math

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.operands import KVCalibration, KVScheme
from infoquant_vllm.kernels.triton.common import (
    MAGIC,
    amax,
    amin,
    base_matrix,
    hadamard_rows,
    hadamard_sizes,
    maximum,
    minimum,
)

TOKENS = 8  # of a program, all of one kv-head


@triton.jit
def scale_and_zero(low, high, clip_ptr, LARGEST: tl.constexpr):
    """Compute scale and zero, float16 [rows], of features within low <= 0 and high >= 0; NaN of rows with NaN."""
    low, high = low * tl.load(clip_ptr), high * tl.load(clip_ptr + 1)
    scale = tl.div_rn(high - low, tl.full(low.shape, LARGEST, tl.float32))
    scale = minimum(maximum(scale, 2.0**-20), 65504.0).to(tl.float16)
    return scale, minimum(maximum(low, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def to_codes(x, scale, zero, LARGEST: tl.constexpr):
    """Quantize x to int32 [rows, features]: (x - zero) / scale, rounded, within 0 .. LARGEST."""
    steps = tl.div_rn(x - zero.to(tl.float32)[:, None], tl.broadcast_to(scale.to(tl.float32)[:, None], x.shape))
    steps = tl.minimum(tl.maximum(steps, -1.0), LARGEST + 1.0)
    return tl.minimum(tl.maximum((steps + MAGIC) - MAGIC, 0.0), 1.0 * LARGEST).to(tl.int32)


@triton.jit
def to_codes_with_feedback(x, scale, zero, feedback_ptr, HEAD: tl.constexpr, LARGEST: tl.constexpr):
    """Quantize x [rows, features] to int32 one feature after another; the error of each is fed to those after it."""
    features = tl.arange(0, x.shape[1])
    codes = tl.zeros(x.shape, tl.int32)
    steps, offset = scale.to(tl.float32)[:, None], zero.to(tl.float32)[:, None]
    for i in range(HEAD):
        here = (features == i)[None, :]
        feature = tl.sum(tl.where(here, x, 0.0), 1)[:, None]
        code = to_codes(feature, scale, zero, LARGEST)
        codes = tl.where(here, code, codes)
        row = tl.load(feedback_ptr + i * HEAD + features, mask=(features > i) & (features < HEAD), other=0.0)
        x += (feature - (code.to(tl.float32) * steps + offset)) * row[None, :]
    return codes


@triton.jit(do_not_specialize=["num_tokens"])
def kv_store_kernel(
    key_ptr,
    value_ptr,
    cache_ptr,
    slots_ptr,
    key_clip_ptr,
    value_clip_ptr,
    key_mean_ptr,
    key_feedback_ptr,
    hadamard_ptr,
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
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Store codes, scales and zeros of TOKENS tokens of one kv-head, each in its own slot of a page.

    A code is clamp(round((x - zero) / scale)) with zero = clip_0 * min(x, 0) and scale = (clip_1 * max(x, 0) - zero)
    / (2^bits - 1); from keys their mean is subtracted first, if there is one, then they are rotated by the Hadamard
    with hadamard_ptr as its base matrix, if there is one (Ashkboos et al., QuaRot, 2024, section 4). With
    key_feedback_ptr [kv_heads, HEAD, HEAD] their features are rounded in order, each error fed to those after it.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots = tl.load(slots_ptr + rows, mask=rows < num_tokens, other=-1).to(tl.int64)
    row_mask = slots >= 0
    rows = rows.to(tl.int64)
    slot = slots % 16  # within a sub-block of 16 tokens
    KEY_BYTES: tl.constexpr = 2 * HEAD * KEY_BITS
    VALUE_BYTES: tl.constexpr = 2 * HEAD * VALUE_BITS
    SUB_BLOCK_BYTES: tl.constexpr = KEY_BYTES + VALUE_BYTES + 128
    sub_block_ptr = cache_ptr + slots // BLOCK * cache_block_stride + head.to(tl.int64) * cache_head_stride
    sub_block_ptr += slots % BLOCK // 16 * SUB_BLOCK_BYTES

    features = tl.arange(0, SIZE)
    mask = row_mask[:, None] & (features < HEAD)[None, :]
    at = rows[:, None] * key_token_stride + head * key_head_stride + features[None, :]
    key = tl.load(key_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if key_mean_ptr is not None:
        key -= tl.load(key_mean_ptr + head * HEAD + features, mask=features < HEAD, other=0.0)[None, :]
    if hadamard_ptr is not None:
        key = hadamard_rows(key, hadamard_ptr, norm, TOKENS, SIZE, ORDER, LOG_N)
    low, high = minimum(amin(key, 1), 0.0), maximum(amax(key, 1), 0.0)
    key_scale, key_zero = scale_and_zero(low, high, key_clip_ptr + 2 * head, 2**KEY_BITS - 1)
    if key_feedback_ptr is not None:
        feedback_ptr = key_feedback_ptr + head * HEAD * HEAD
        codes = to_codes_with_feedback(key, key_scale, key_zero, feedback_ptr, HEAD, 2**KEY_BITS - 1)
    else:
        codes = to_codes(key, key_scale, key_zero, 2**KEY_BITS - 1)
    if KEY_BITS == 4:
        PAIRS: tl.constexpr = SIZE // 2
        codes = tl.permute(tl.reshape(codes, [TOKENS, SIZE // 8, 2, 4]), (0, 1, 3, 2))
        first, second = tl.split(codes)
        codes = tl.reshape(first | (second << 4), [TOKENS, PAIRS])
        byte = tl.arange(0, PAIRS)
        mask = row_mask[:, None] & (byte < HEAD // 2)[None, :]
    else:
        byte = features
    at = (byte // 4 * 64 + byte % 4)[None, :] + slot[:, None] * 4
    tl.store(sub_block_ptr[:, None] + at, codes.to(tl.uint8), mask=mask)

    # A value's byte holds features half a head apart, so halves are read apart: with 8 bits the second is empty.
    STORED: tl.constexpr = HEAD * VALUE_BITS // 8
    PADDED: tl.constexpr = SIZE * VALUE_BITS // 8
    byte = tl.arange(0, PADDED)
    mask = row_mask[:, None] & (byte < STORED)[None, :]
    at = rows[:, None] * value_token_stride + head * value_head_stride + byte[None, :]
    value = tl.load(value_ptr + at, mask=mask, other=0.0).to(tl.float32)
    low, high = minimum(amin(value, 1), 0.0), maximum(amax(value, 1), 0.0)
    if VALUE_BITS == 4:
        upper = tl.load(value_ptr + at + STORED, mask=mask, other=0.0).to(tl.float32)
        low, high = minimum(low, amin(upper, 1)), maximum(high, amax(upper, 1))
    value_scale, value_zero = scale_and_zero(low, high, value_clip_ptr + 2 * head, 2**VALUE_BITS - 1)
    codes = to_codes(value, value_scale, value_zero, 2**VALUE_BITS - 1)
    if VALUE_BITS == 4:
        codes |= to_codes(upper, value_scale, value_zero, 2**VALUE_BITS - 1) << 4
    at = (slot // 4 * (4 * STORED) + slot % 4)[:, None] + 4 * byte[None, :]
    tl.store(sub_block_ptr[:, None] + KEY_BYTES + at, codes.to(tl.uint8), mask=mask)

    params_ptr = (sub_block_ptr + KEY_BYTES + VALUE_BYTES).to(tl.pointer_type(tl.float16), bitcast=True) + slot
    tl.store(params_ptr, key_scale, mask=row_mask)
    tl.store(params_ptr + 16, key_zero, mask=row_mask)
    tl.store(params_ptr + 32, value_scale, mask=row_mask)
    tl.store(params_ptr + 48, value_zero, mask=row_mask)


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    calibration: KVCalibration,
    scheme: KVScheme,
) -> None:
    """Store what the reference does, of [tokens, kv_heads, head_size] with any strides of tokens and heads."""
    key_clip_ratio, value_clip_ratio, key_mean, key_feedback = calibration
    num_bits, hadamard = scheme
    tokens, (_, kv_heads, size) = len(slots), key.shape
    assert key.stride(2) == value.stride(2) == 1, "features of a head must be contiguous"
    assert cache.stride()[2:] == (cache.shape[3], 1), "KV entries of a page must be contiguous"
    if tokens == 0:
        return
    order, log_n = hadamard_sizes(size, hadamard)
    kv_store_kernel[(triton.cdiv(tokens, TOKENS), kv_heads)](
        key,
        value,
        cache,
        slots,
        key_clip_ratio,
        value_clip_ratio,
        key_mean,
        key_feedback,
        base_matrix(size, key.device) if hadamard else None,
        1 / math.sqrt(size),
        tokens,
        *key.stride()[:2],
        *value.stride()[:2],
        *cache.stride()[:2],
        BLOCK=cache.shape[2],
        HEAD=size,
        SIZE=triton.next_power_of_2(size),
        ORDER=order,
        LOG_N=log_n,
        KEY_BITS=num_bits[0],
        VALUE_BITS=num_bits[1],
        TOKENS=TOKENS,
        num_warps=4,
        enable_fp_fusion=False,  # codes are the reference's: every operation rounds
    )
