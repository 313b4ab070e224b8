"""Rows of queries over a sequence in the quantized cache; layout and what is rounded: kernels/reference/kv_cache.py.

Products are whole numbers: queries, and weights times the scales of values, are rounded to 32512 steps of a row's
greatest and written 256 a + b with signed bytes a and b, so that they meet the codes, unpacked to bytes and no
further, on INT8 tensor cores with exact sums. Scales and zeros of keys enter the scores, the scales of values the
exponents, their zeros one sum per row:

    y[t] = c (P[t] key_scale[t] + Q key_zero[t]) + log2 value_scale[t],   w[t] = 2^(y[t] - max y)
    out = (sum w[t] code[t] + sum w[t] value_zero[t] / value_scale[t]) / (sum w[t] / value_scale[t])

for P the product of the whole query with the codes, Q the sum of the whole query, c its step times the scale in powers
of two. A soft-cap bends the first term (Gemma 2, 2024, section 2). Softmax goes chunk by chunk of CHUNK tokens counted
from the sequence's first (Milakov and Gimelshein, Online normalizer calculation, 2018; Dao et al., FlashAttention,
2022); weights are rounded relative to their own chunk's
greatest, so that many small ones beside a great one are not lost.
"""

import math

import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.extremes import amax, maximum
from infoquant_vllm.kernels.triton.hadamard import once
from infoquant_vllm.kernels.triton.head_hadamard import hadamard_rows

LEVELS = tl.constexpr(32512.0)  # 127 * 256: whole numbers up to here are 256 a + b with signed bytes a and b
LOG_LEVELS = tl.constexpr(math.log2(32512.0))
TINY = tl.constexpr(2.0**-100)
MAGIC = tl.constexpr(1.5 * 2**23)  # added, it leaves a whole number, ties to even, in the lowest bits
HIDDEN = tl.constexpr(-(2.0**30))  # the score of a token that is not seen, below any other
LOWEST = tl.constexpr(-(2.0**29))
TWO_LOG_E = tl.constexpr(2 * math.log2(math.e))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
UNPACK = tl.constexpr("and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;")


@triton.jit
def nibbles(packed):
    """Low and high codes, int8, of bytes: four at a time in a 32-bit register, of which the interpreter has none."""
    if INTERPRETED:
        low, high = (packed & 15).to(tl.int8), (packed >> 4).to(tl.int8)
    else:
        low, high = tl.inline_asm_elementwise(
            UNPACK, "=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def approximate(x, FUNCTION: tl.constexpr):
    """ex2, lg2 or rcp in one instruction: numbers so small that it takes them for zero do not matter here."""
    if INTERPRETED:
        y = tl.exp2(x) if FUNCTION == "ex2" else tl.log2(x) if FUNCTION == "lg2" else 1.0 / x
    else:
        ASM: tl.constexpr = FUNCTION + ".approx.ftz.f32 $0, $1;"
        y = tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def capped(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP), of a tanh that is right to seven digits of 1; the GPU's own has three."""
    power = approximate(x * (TWO_LOG_E / CAP), "ex2")
    return CAP - 2 * CAP * approximate(power + 1, "rcp")


@triton.jit
def signed_bytes(whole):
    """a and b, int8 [rows, n], of whole numbers 256 a + b in the lower half of int32.

    Eight rows or fewer leave half of a tensor core's 16 idle: there a and b are one operand [2 * rows, n], given twice.
    """
    whole += 128
    a, b = (whole >> 8).to(tl.int8), (whole ^ 128).to(tl.int8)
    if whole.shape[0] < 16:
        a = tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), [2 * whole.shape[0], whole.shape[1]])
        b = a
    return a, b


@triton.jit
def products(a, b, codes, ROWS: tl.constexpr):
    """int32 [ROWS, n]: whole numbers of `signed_bytes` times codes int8 [k, n]."""
    product = tl.dot(a, codes, out_dtype=tl.int32)
    if ROWS < 16:
        of_a, of_b = tl.split(tl.permute(tl.reshape(product, [2, ROWS, codes.shape[1]]), (1, 2, 0)))
        product = of_a * 256 + of_b
    else:
        product = tl.dot(b, codes, product * 256, out_dtype=tl.int32)
    return product


@triton.jit
def read_query(
    query_ptr,
    factor_ptr,
    norm,
    there,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    LOG_N: tl.constexpr,
    HADAMARD: tl.constexpr,
):
    """Whole numbers int32 [ROWS, SIZE] of the queries at query_ptr [ROWS], and steps float32 [ROWS]."""
    features = tl.arange(0, SIZE)
    mask = there[:, None] & (features < HEAD)[None, :]
    q = tl.load(query_ptr[:, None] + features[None, :], mask=mask, other=0.0).to(tl.float32)
    if HADAMARD:
        q = hadamard_rows(q, factor_ptr, norm, ROWS, SIZE, ORDER, LOG_N)
    largest = maximum(amax(tl.abs(q), 1), TINY)
    whole = (q * tl.div_rn(tl.full(largest.shape, LEVELS, tl.float32), largest)[:, None] + MAGIC) - MAGIC
    return whole.to(tl.int32), largest / LEVELS


@triton.jit
def read_tiles(base_ptr, table_ptr, tiles, end, stride, BLOCK: tl.constexpr, TILE_BYTES: tl.constexpr):
    """Pointers to tiles of 16 tokens of a sequence, by their numbers, and which begin before token `end`."""
    there = tiles * 16 < end
    block = tl.load(table_ptr + tiles // (BLOCK // 16), mask=there, other=0).to(tl.int64)
    return base_ptr + block * stride + tiles % (BLOCK // 16) * TILE_BYTES, there


@triton.jit
def split_query(whole, ROWS: tl.constexpr, SIZE: tl.constexpr, KEY_BITS: tl.constexpr):
    """a and b of the features of low nibbles, then of those of high ones; with bytes all of them twice."""
    if KEY_BITS == 4:
        low, high = tl.split(tl.permute(tl.reshape(whole, [ROWS, SIZE // 8, 2, 4]), (0, 1, 3, 2)))
        low_a, low_b = signed_bytes(tl.reshape(low, [ROWS, SIZE // 2]))
        high_a, high_b = signed_bytes(tl.reshape(high, [ROWS, SIZE // 2]))
    else:
        low_a, low_b = signed_bytes(whole)
        high_a, high_b = low_a, low_b
    return low_a, low_b, high_a, high_b


@triton.jit
def key_tiles(codes, CHUNK: tl.constexpr):
    """int8 [tiles, bytes] as they lie in pages to [features, CHUNK]."""
    TILES: tl.constexpr = CHUNK // 16
    QUADS: tl.constexpr = codes.shape[1] // 64
    codes = tl.permute(tl.reshape(codes, [TILES, QUADS, 16, 4]), (0, 2, 1, 3))
    return tl.trans(tl.reshape(codes, [CHUNK, 4 * QUADS]))


@triton.jit
def value_tiles(codes, CHUNK: tl.constexpr):
    """int8 [quads, bytes] as they lie in pages to [CHUNK, features]."""
    FEATURES: tl.constexpr = codes.shape[1] // 4
    codes = tl.permute(tl.reshape(codes, [CHUNK // 4, FEATURES, 4]), (0, 2, 1))
    return tl.reshape(codes, [CHUNK, FEATURES])


@triton.jit
def key_products(
    low_a,
    low_b,
    high_a,
    high_b,
    query_sum,
    packed,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    KEY_BITS: tl.constexpr,
):
    """Products int32 [ROWS, CHUNK] of whole queries with the codes of keys, packed as they lie in pages."""
    if KEY_BITS == 4:
        low, high = nibbles(packed)
        product = products(low_a, low_b, key_tiles(low, CHUNK), ROWS)
        product += products(high_a, high_b, key_tiles(high, CHUNK), ROWS)
    else:  # less 128, so that they are signed
        codes = key_tiles((packed ^ 128).to(tl.int8, bitcast=True), CHUNK)
        product = products(low_a, low_b, codes, ROWS) + query_sum[:, None] * 128
    return product


@triton.jit
def value_products(weights, packed, ROWS: tl.constexpr, CHUNK: tl.constexpr, VALUE_BITS: tl.constexpr):
    """Products float32 of weights [ROWS, CHUNK], rounded, with the codes of values; see `attend` for the halves."""
    whole = (weights + MAGIC).to(tl.int32, bitcast=True)
    a, b = signed_bytes(whole)
    if VALUE_BITS == 4:
        low, high = nibbles(packed)
        lower = products(a, b, value_tiles(low, CHUNK), ROWS)
        upper = products(a, b, value_tiles(high, CHUNK), ROWS)
    else:
        codes = value_tiles((packed ^ 128).to(tl.int8, bitcast=True), CHUNK)
        lower = products(a, b, codes, ROWS) + tl.sum(whole & 0xFFFF, 1)[:, None] * 128
        upper = lower
    return lower.to(tl.float32), upper.to(tl.float32)


@triton.jit
def read_numbers(tile_ptr, offset, tokens, there):
    """Key scales and zeros, value scales and zeros, float32, of tokens in tiles at tile_ptr, which lie at an offset."""
    ptr = (tile_ptr + offset).to(tl.pointer_type(tl.float16), bitcast=True) + tokens % 16
    key_scale = tl.load(ptr, mask=there, other=0.0).to(tl.float32)
    key_zero = tl.load(ptr + 16, mask=there, other=0.0).to(tl.float32)
    value_scale = tl.load(ptr + 32, mask=there, other=1.0).to(tl.float32)
    value_zero = tl.load(ptr + 48, mask=there, other=0.0).to(tl.float32)
    return key_scale, key_zero, value_scale, value_zero


@triton.jit
def attend(
    whole,
    step,
    position,
    first,
    end,
    base_ptr,
    table_ptr,
    block_stride,
    log_scale,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
):
    """Rows of queries over tokens first .. end, of which a row sees those up to its position [ROWS].

    SOFT_CAP bounds scores, in powers of two; 0: nothing does, and nothing is computed for it.
    Returns sums relative to 2^largest [ROWS]: result [ROWS, features] in two halves (with 8-bit values the first is all
    of it), and the total of weights [ROWS]. `first` is a multiple of CHUNK.
    """
    KEY_BYTES: tl.constexpr = 2 * HEAD * KEY_BITS
    VALUE_BYTES: tl.constexpr = 2 * HEAD * VALUE_BITS
    TILE_BYTES: tl.constexpr = KEY_BYTES + VALUE_BYTES + 128
    KEY_WIDTH: tl.constexpr = 2 * SIZE * KEY_BITS  # of a tile, padded
    QUAD_BYTES: tl.constexpr = VALUE_BYTES // 4  # values of four tokens
    QUAD_WIDTH: tl.constexpr = SIZE * VALUE_BITS // 2

    low_a, low_b, high_a, high_b = split_query(whole, ROWS, SIZE, KEY_BITS)
    query_sum = tl.sum(whole, 1)
    c = step * log_scale
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, QUAD_WIDTH // 4], tl.float32)
    upper = tl.zeros([ROWS, QUAD_WIDTH // 4], tl.float32)
    tile, key_place = tl.arange(0, CHUNK // 16), tl.arange(0, KEY_WIDTH)
    quad, value_place = tl.arange(0, CHUNK // 4), tl.arange(0, QUAD_WIDTH)
    for start in tl.range(first, end, CHUNK):
        tokens = start + tl.arange(0, CHUNK)
        key_ptr, keys_there = read_tiles(base_ptr, table_ptr, start // 16 + tile, end, block_stride, BLOCK, TILE_BYTES)
        value_ptr, values_there = read_tiles(
            base_ptr, table_ptr, start // 16 + quad // 4, end, block_stride, BLOCK, TILE_BYTES
        )
        number_ptr, _ = read_tiles(base_ptr, table_ptr, tokens // 16, end, block_stride, BLOCK, TILE_BYTES)
        keys = tl.load(
            key_ptr[:, None] + key_place[None, :],
            mask=keys_there[:, None] & (key_place < KEY_BYTES)[None, :],
            other=0,
        )
        values = tl.load(
            (value_ptr + KEY_BYTES + quad % 4 * QUAD_BYTES)[:, None] + value_place[None, :],
            mask=values_there[:, None] & (value_place < QUAD_BYTES)[None, :],
            other=0,
        )
        # Beyond the end lies what was there before, which may be no number at all.
        key_scale, key_zero, value_scale, value_zero = read_numbers(
            number_ptr, KEY_BYTES + VALUE_BYTES, tokens, tokens < end
        )
        key_scale, key_zero, inverse = once(key_scale), once(key_zero), once(approximate(value_scale, "rcp"))
        log_value_scale, shift = once(approximate(value_scale, "lg2")), once(value_zero * inverse)
        product = key_products(low_a, low_b, high_a, high_b, query_sum, keys, ROWS, CHUNK, KEY_BITS).to(tl.float32)
        scores = product * key_scale[None, :] + query_sum.to(tl.float32)[:, None] * key_zero[None, :]
        scores = scores * c[:, None]
        if SOFT_CAP > 0:
            scores = capped(scores, SOFT_CAP)
        scores += log_value_scale[None, :]
        age = position[:, None] - tokens[None, :]
        visible = (age >= 0) & (age < WINDOW) if WINDOW > 0 else age >= 0
        scores = tl.where(visible, scores, HIDDEN)
        exponent = tl.maximum(tl.max(scores, 1), LOWEST)
        weights = approximate(scores - (exponent - LOG_LEVELS)[:, None], "ex2")
        before = largest
        largest = tl.maximum(before, exponent)
        old, new = approximate(before - largest, "ex2"), approximate(exponent - largest, "ex2")
        total = total * old + tl.sum(weights * inverse[None, :], 1) * new
        zero = zero * old + tl.sum(weights * shift[None, :], 1) * new
        lower_product, upper_product = value_products(weights, values, ROWS, CHUNK, VALUE_BITS)
        result = result * old[:, None] + lower_product * new[:, None]
        upper = upper * old[:, None] + upper_product * new[:, None]
    return result + zero[:, None], upper + zero[:, None], largest, total


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
