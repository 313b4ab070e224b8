"""Rows of queries over a sequence in the quantized cache; layout and what is rounded: kernels/torch/kv_cache.py.

Products are of integers: queries, and weights times the scales of values, are rounded to 32512 steps of a row's
greatest and written 256 a + b with signed bytes a and b, so that they meet the codes, unpacked to bytes and no
further, on INT8 tensor cores with exact sums. Scales and zeros of keys enter the scores, the scales of values the
exponents, their zeros one sum per row:

    y[t] = c (P[t] key_scale[t] + Q key_zero[t]) + log2 value_scale[t],   w[t] = 2^(y[t] - max y)
    out = (sum w[t] code[t] + sum w[t] value_zero[t] / value_scale[t]) / (sum w[t] / value_scale[t])

for P the product of the int16 query with the codes, Q the sum of the int16 query, c its step times the scale in powers
of two. A soft-cap bounds the first term (Gemma 2, 2024, section 2). Softmax goes chunk by chunk of CHUNK tokens counted
from the sequence's first (Milakov and Gimelshein, Online normalizer calculation, 2018; Dao et al., FlashAttention,
2022); weights are rounded relative to their own chunk's greatest, so that many small ones beside a great one are kept.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.common import (
    INTERPRETED,
    MAGIC,
    amax,
    hadamard_rows,
    hadamard_sizes,
    maximum,
    once,
    unpack_nibbles,
)
from infoquant_vllm.kernels.triton.tiles import AttentionTile

LEVELS = tl.constexpr(32512.0)  # 127 * 256: integers up to it are 256 a + b with signed bytes a and b
LOG_LEVELS = tl.constexpr(math.log2(32512.0))
TINY = tl.constexpr(2.0**-100)
MASKED = tl.constexpr(-(2.0**30))  # the score of a token that is not visible, below any other
LOWEST = tl.constexpr(-(2.0**29))
TWO_LOG_E = tl.constexpr(2 * math.log2(math.e))


class Shape(NamedTuple):
    """Constants of an attention kernel: those of a layer and of its tile."""

    window: int
    """tokens; 0: all"""
    soft_cap: float
    """bound on scores in powers of two; 0: none"""
    block: int
    """tokens of a page"""
    head: int
    """features"""
    group: int
    """heads of a kv-head"""
    rows: int
    """queries times heads"""
    size: int
    """features, padded"""
    chunk: int
    """tokens of a step"""
    order: int
    """of the Hadamard's base matrix"""
    log_n: int
    """butterfly steps"""
    key_bits: int
    value_bits: int


class Pages(NamedTuple):
    """A sequence's pages of a kv-head: pointers to the cache and to the block table, bytes between pages."""

    base_ptr: Any
    table_ptr: Any
    block_stride: Any


class Layer(NamedTuple):
    """A layer's attention: `group` heads to a kv-head; window and soft_cap 0: none."""

    block: int
    head_size: int
    group: int
    num_bits: tuple[int, int]
    hadamard: bool
    window: int
    soft_cap: float

    def constants(self, tile: AttentionTile) -> dict[str, Any]:
        """Return what a kernel is compiled for with a tile, its launch options included."""
        order, log_n = hadamard_sizes(self.head_size, self.hadamard)
        shape = Shape(
            window=self.window,
            soft_cap=self.soft_cap,
            block=self.block,
            head=self.head_size,
            group=self.group,
            rows=tile.rows,
            size=max(64, triton.next_power_of_2(self.head_size)),
            chunk=tile.chunk,
            order=order,
            log_n=log_n,
            key_bits=self.num_bits[0],
            value_bits=self.num_bits[1],
        )
        return {
            "SHAPE": shape,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": 255,  # left alone, ptxas spills a few bytes of some for the sake of a third program
            "enable_fp_fusion": True,
        }


def layer_of(
    query: torch.Tensor,
    cache: torch.Tensor,
    out: torch.Tensor,
    hadamard: bool,
    window: int | None,
    num_bits: tuple[int, int],
    soft_cap: float | None,
) -> Layer:
    """Return the layer with this query and output [tokens, heads, head_size] and cache."""
    assert query.stride(2) == out.stride(2) == 1, "features of a head must be contiguous"
    assert cache.stride()[2:] == (cache.shape[3], 1), "KV entries of a page must be contiguous"
    (_, heads, size), (_, kv_heads, block, _) = query.shape, cache.shape
    cap = (soft_cap or 0.0) * math.log2(math.e)
    return Layer(block, size, heads // kv_heads, num_bits, hadamard, window or 0, cap)


def query_scales(size: int, scale: float) -> tuple[float, float]:
    """Return the norm of a Hadamard of queries, and the scale of scores in powers of two."""
    return 1 / math.sqrt(size), scale * math.log2(math.e)


@triton.jit
def approximate(x, FUNCTION: tl.constexpr):
    """Compute ex2, lg2 or rcp in one instruction, which flushes denormals: they do not matter here."""
    if INTERPRETED:
        y = tl.exp2(x) if FUNCTION == "ex2" else tl.log2(x) if FUNCTION == "lg2" else 1.0 / x
    else:
        ASM: tl.constexpr = FUNCTION + ".approx.ftz.f32 $0, $1;"
        y = tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def soft_capped(x, CAP: tl.constexpr):
    """Compute CAP * tanh(x / CAP), with a tanh accurate to seven digits of 1; the GPU's own has three."""
    power = approximate(x * (TWO_LOG_E / CAP), "ex2")
    return CAP - 2 * CAP * approximate(power + 1, "rcp")


@triton.jit
def signed_bytes(integers):
    """Split integers 256 a + b in the lower half of int32 into a and b, int8 [rows, n].

    Eight rows or fewer leave half of a tensor core's 16 idle: then a and b are one operand [2 * rows, n], returned
    twice.
    """
    integers += 128
    a, b = (integers >> 8).to(tl.int8), (integers ^ 128).to(tl.int8)
    if integers.shape[0] < 16:
        a = tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), [2 * integers.shape[0], integers.shape[1]])
        b = a
    return a, b


@triton.jit
def multiply_int16(a, b, codes, ROWS: tl.constexpr):
    """Multiply integers, as `signed_bytes` returns them, with codes int8 [k, n]: int32 [ROWS, n]."""
    product = tl.dot(a, codes, out_dtype=tl.int32)
    if ROWS < 16:
        of_a, of_b = tl.split(tl.permute(tl.reshape(product, [2, ROWS, codes.shape[1]]), (1, 2, 0)))
        product = of_a * 256 + of_b
    else:
        product = tl.dot(b, codes, product * 256, out_dtype=tl.int32)
    return product


@triton.jit
def read_query(query_ptr, hadamard_ptr, norm, mask, SHAPE: tl.constexpr):
    """Read the queries at query_ptr [ROWS] as integers int32 [ROWS, SIZE] and steps float32 [ROWS].

    hadamard_ptr: the base matrix of a Hadamard; None: there is no Hadamard.
    """
    features = tl.arange(0, SHAPE.size)
    mask = mask[:, None] & (features < SHAPE.head)[None, :]
    q = tl.load(query_ptr[:, None] + features[None, :], mask=mask, other=0.0).to(tl.float32)
    if hadamard_ptr is not None:
        q = hadamard_rows(q, hadamard_ptr, norm, SHAPE.rows, SHAPE.size, SHAPE.order, SHAPE.log_n)
    largest = maximum(amax(tl.abs(q), 1), TINY)
    integers = (q * tl.div_rn(tl.full(largest.shape, LEVELS, tl.float32), largest)[:, None] + MAGIC) - MAGIC
    return integers.to(tl.int32), largest / LEVELS


@triton.jit
def split_query(query, ROWS: tl.constexpr, SIZE: tl.constexpr, KEY_BITS: tl.constexpr):
    """Return bytes a and b of features that meet low nibbles, then high ones; with 8 bits those of all, twice."""
    if KEY_BITS == 4:
        low, high = tl.split(tl.permute(tl.reshape(query, [ROWS, SIZE // 8, 2, 4]), (0, 1, 3, 2)))
        low_a, low_b = signed_bytes(tl.reshape(low, [ROWS, SIZE // 2]))
        high_a, high_b = signed_bytes(tl.reshape(high, [ROWS, SIZE // 2]))
    else:
        low_a, low_b = signed_bytes(query)
        high_a, high_b = low_a, low_b
    return low_a, low_b, high_a, high_b


@triton.jit
def read_sub_blocks(pages, index, end, BLOCK: tl.constexpr, SUB_BLOCK_BYTES: tl.constexpr):
    """Return pointers to sub-blocks of 16 tokens of a sequence, and which begin before token `end`."""
    in_bounds = index * 16 < end
    block = tl.load(pages.table_ptr + index // (BLOCK // 16), mask=in_bounds, other=0).to(tl.int64)
    return pages.base_ptr + block * pages.block_stride + index % (BLOCK // 16) * SUB_BLOCK_BYTES, in_bounds


@triton.jit
def key_matrix(codes, CHUNK: tl.constexpr):
    """Arrange key codes int8 [sub-blocks, bytes], as they lie in pages, to [features, CHUNK]."""
    QUADS: tl.constexpr = codes.shape[1] // 64
    codes = tl.permute(tl.reshape(codes, [CHUNK // 16, QUADS, 16, 4]), (0, 2, 1, 3))
    return tl.trans(tl.reshape(codes, [CHUNK, 4 * QUADS]))


@triton.jit
def value_matrix(codes, CHUNK: tl.constexpr):
    """Arrange value codes int8 [quads of tokens, bytes], as they lie in pages, to [CHUNK, features]."""
    FEATURES: tl.constexpr = codes.shape[1] // 4
    codes = tl.permute(tl.reshape(codes, [CHUNK // 4, FEATURES, 4]), (0, 2, 1))
    return tl.reshape(codes, [CHUNK, FEATURES])


@triton.jit
def key_products(query_bytes, query_sum, packed, ROWS: tl.constexpr, CHUNK: tl.constexpr, KEY_BITS: tl.constexpr):
    """Multiply queries from `split_query` with keys, packed as they lie in pages: int32 [ROWS, CHUNK]."""
    low_a, low_b, high_a, high_b = query_bytes
    if KEY_BITS == 4:
        low, high = unpack_nibbles(packed, False)
        product = multiply_int16(low_a, low_b, key_matrix(low, CHUNK), ROWS)
        product += multiply_int16(high_a, high_b, key_matrix(high, CHUNK), ROWS)
    else:  # less 128, so that they are signed
        codes = key_matrix((packed ^ 128).to(tl.int8, bitcast=True), CHUNK)
        product = multiply_int16(low_a, low_b, codes, ROWS) + query_sum[:, None] * 128
    return product


@triton.jit
def value_products(weights, packed, ROWS: tl.constexpr, CHUNK: tl.constexpr, VALUE_BITS: tl.constexpr):
    """Round weights [ROWS, CHUNK] and multiply them with values: two halves of features, see `attend`, float32."""
    integers = (weights + MAGIC).to(tl.int32, bitcast=True)
    a, b = signed_bytes(integers)
    if VALUE_BITS == 4:
        low, high = unpack_nibbles(packed, False)
        lower = multiply_int16(a, b, value_matrix(low, CHUNK), ROWS)
        upper = multiply_int16(a, b, value_matrix(high, CHUNK), ROWS)
    else:
        codes = value_matrix((packed ^ 128).to(tl.int8, bitcast=True), CHUNK)
        lower = multiply_int16(a, b, codes, ROWS) + tl.sum(integers & 0xFFFF, 1)[:, None] * 128
        upper = lower
    return lower.to(tl.float32), upper.to(tl.float32)


@triton.jit
def read_params(sub_block_ptr, offset, in_bounds, seen, CHUNK: tl.constexpr):
    """Read key scales and zeros, value scales and zeros, float32 [CHUNK], which lie at an offset in sub-blocks.

    The 64 numbers of a sub-block of 16 tokens are read together: as vectors, so that their loads are pipelined.
    seen: which tokens there are; beyond them is what an earlier sequence left, or NaN.
    """
    ptr = (sub_block_ptr + offset).to(tl.pointer_type(tl.float16), bitcast=True)
    params = tl.load(ptr[:, None] + tl.arange(0, 64)[None, :], mask=in_bounds[:, None], other=0.0)
    params = tl.permute(tl.reshape(params, [CHUNK // 16, 2, 2, 16]), (0, 3, 1, 2))
    scales, zeros = tl.split(params)
    key_scale, value_scale = tl.split(scales)
    key_zero, value_zero = tl.split(zeros)
    key_scale = tl.where(seen, tl.reshape(key_scale, [CHUNK]).to(tl.float32), 0.0)
    key_zero = tl.where(seen, tl.reshape(key_zero, [CHUNK]).to(tl.float32), 0.0)
    value_scale = tl.where(seen, tl.reshape(value_scale, [CHUNK]).to(tl.float32), 1.0)
    value_zero = tl.where(seen, tl.reshape(value_zero, [CHUNK]).to(tl.float32), 0.0)
    return key_scale, key_zero, value_scale, value_zero


@triton.jit
def attend(query, step, position, first, end, pages, log_scale, SHAPE: tl.constexpr):
    """Attend from rows of queries to tokens first .. end, of which a row sees those up to its position [ROWS].

    query int32 [ROWS, SIZE] and step [ROWS] from `read_query`; `first` is a multiple of CHUNK. Returns sums relative to
    2^largest: results [ROWS, features] in two halves (with 8-bit values the first is all of it), then largest [ROWS]
    and the total of weights [ROWS].
    """
    ROWS: tl.constexpr = SHAPE.rows
    CHUNK: tl.constexpr = SHAPE.chunk
    KEY_BYTES: tl.constexpr = 2 * SHAPE.head * SHAPE.key_bits  # of a sub-block of 16 tokens
    VALUE_BYTES: tl.constexpr = 2 * SHAPE.head * SHAPE.value_bits
    BYTES: tl.constexpr = KEY_BYTES + VALUE_BYTES + 128
    KEY_WIDTH: tl.constexpr = 2 * SHAPE.size * SHAPE.key_bits  # KEY_BYTES, padded
    QUAD_BYTES: tl.constexpr = VALUE_BYTES // 4  # values of four tokens
    QUAD_WIDTH: tl.constexpr = SHAPE.size * SHAPE.value_bits // 2

    query_bytes = split_query(query, ROWS, SHAPE.size, SHAPE.key_bits)
    query_sum = tl.sum(query, 1)
    c = step * log_scale
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    zero = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, QUAD_WIDTH // 4], tl.float32)
    upper = tl.zeros([ROWS, QUAD_WIDTH // 4], tl.float32)
    sub_block, key_byte = tl.arange(0, CHUNK // 16), tl.arange(0, KEY_WIDTH)
    quad, value_byte = tl.arange(0, CHUNK // 4), tl.arange(0, QUAD_WIDTH)
    for start in tl.range(first, end, CHUNK):
        tokens = start + tl.arange(0, CHUNK)
        key_ptr, key_mask = read_sub_blocks(pages, start // 16 + sub_block, end, SHAPE.block, BYTES)
        value_ptr, value_mask = read_sub_blocks(pages, start // 16 + quad // 4, end, SHAPE.block, BYTES)
        keys = tl.load(
            key_ptr[:, None] + key_byte[None, :],
            mask=key_mask[:, None] & (key_byte < KEY_BYTES)[None, :],
            other=0,
        )
        values = tl.load(
            (value_ptr + KEY_BYTES + quad % 4 * QUAD_BYTES)[:, None] + value_byte[None, :],
            mask=value_mask[:, None] & (value_byte < QUAD_BYTES)[None, :],
            other=0,
        )
        key_scale, key_zero, value_scale, value_zero = read_params(
            key_ptr, KEY_BYTES + VALUE_BYTES, key_mask, tokens < end, CHUNK
        )
        key_scale, key_zero, inverse = once(key_scale), once(key_zero), once(approximate(value_scale, "rcp"))
        log_value_scale, shift = once(approximate(value_scale, "lg2")), once(value_zero * inverse)
        product = key_products(query_bytes, query_sum, keys, ROWS, CHUNK, SHAPE.key_bits).to(tl.float32)
        scores = product * key_scale[None, :] + query_sum.to(tl.float32)[:, None] * key_zero[None, :]
        scores = scores * c[:, None]
        if SHAPE.soft_cap > 0:
            scores = soft_capped(scores, SHAPE.soft_cap)
        scores += log_value_scale[None, :]
        age = position[:, None] - tokens[None, :]
        visible = (age >= 0) & (age < SHAPE.window) if SHAPE.window > 0 else age >= 0
        scores = tl.where(visible, scores, MASKED)
        exponent = tl.maximum(tl.max(scores, 1), LOWEST)
        weights = approximate(scores - (exponent - LOG_LEVELS)[:, None], "ex2")
        before = largest
        largest = tl.maximum(before, exponent)
        old, new = approximate(before - largest, "ex2"), approximate(exponent - largest, "ex2")
        total = total * old + tl.sum(weights * inverse[None, :], 1) * new
        zero = zero * old + tl.sum(weights * shift[None, :], 1) * new
        lower_product, upper_product = value_products(weights, values, ROWS, CHUNK, SHAPE.value_bits)
        result = result * old[:, None] + lower_product * new[:, None]
        upper = upper * old[:, None] + upper_product * new[:, None]
    return result + zero[:, None], upper + zero[:, None], largest, total


@triton.jit
def store_halves(ptr, mask, result, upper, HEAD: tl.constexpr, VALUE_BITS: tl.constexpr):
    """Write rows of results, in the two halves of `attend`, to ptr [ROWS] in the dtype that it points to."""
    STORED: tl.constexpr = HEAD * VALUE_BITS // 8
    features = tl.arange(0, result.shape[1])
    mask = mask[:, None] & (features < STORED)[None, :]
    out_ptr = ptr[:, None] + features[None, :]
    tl.store(out_ptr, result.to(ptr.dtype.element_ty), mask=mask)
    if VALUE_BITS == 4:
        tl.store(out_ptr + STORED, upper.to(ptr.dtype.element_ty), mask=mask)
