"""The kernel that transforms activations and quantizes them in one pass; formulas of kernels/torch/quantize.py.

Whole segments are in registers, nearly always whole rows: they are read once, and values written once.
"""

import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.common import (
    INTERPRETED,
    MAGIC,
    MAGIC_BITS,
    amax,
    amin,
    butterflies,
    maximum,
    minimum,
    narrow,
    once,
)

DEPTH = tl.constexpr(16)  # features that a product on tensor cores sums at the least
LARGEST_VALUE = tl.constexpr(120.0)  # integer of a segment's largest code, see kernels/torch/quantize.py


@triton.jit(do_not_specialize=["M"])
def rotate_quantize_kernel(
    x_ptr,
    left_ptr,
    right_ptr,
    clip_ptr,
    mean_ptr,
    expert_ptr,
    values_ptr,
    scale_ptr,
    zp_offset_ptr,
    sums_ptr,
    M,
    x_stride,
    values_stride,
    HADAMARD: tl.constexpr,
    SIGNS: tl.constexpr,
    FACTOR: tl.constexpr,
    EXACT_FACTOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    OUTER_PADDED: tl.constexpr,
    INNER_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SEGMENT_PADDED: tl.constexpr,
    GATED: tl.constexpr,
    NUM_BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Transform and quantize a segment of BLOCKS * OUTER * INNER features, in GROUPS groups, of ROWS tokens.

    x [M, x_stride]; a segment's block X [OUTER, INNER] becomes left^T X right: butterflies in place of right for a
    Hadamard (times FACTOR in the end), left [OUTER, OUTER] its base matrix or a Kronecker pair's first, each of them
    None if absent. The base matrix goes first, when x still has 16 bits: its entries are +-1 (SIGNS) or the Hartley
    matrix's. Other products are float32 in three TF32 steps. Then mean [features of all segments] is subtracted, if
    there is one. clip [groups of all segments, 2]; values [rows, values_stride] int8 in segments of SEGMENT_PADDED,
    scale, zp_offset, sums [segments, rows] as in `Codes`. A token has one row, at 16 bits two: high and low bytes.

    GATED rows of x hold gate before up, each of all features, and silu(gate) * up is transformed. With expert [M], one
    for each token, clip is [experts, groups, 2], and tokens of experts below 0 are left out.
    """
    SEGMENT: tl.constexpr = BLOCKS * OUTER * INNER
    LINES: tl.constexpr = ROWS * BLOCKS_PADDED * OUTER_PADDED
    line, inner = tl.arange(0, LINES), tl.arange(0, INNER_PADDED)
    outer, block = line % OUTER_PADDED, line // OUTER_PADDED % BLOCKS_PADDED
    token = (tl.program_id(0) * ROWS + line // (OUTER_PADDED * BLOCKS_PADDED)).to(tl.int64)
    segment = tl.program_id(1)
    feature = ((block * OUTER + outer) * INNER)[:, None] + inner[None, :]
    mask = ((token < M) & (outer < OUTER) & (block < BLOCKS))[:, None] & (inner < INNER)[None, :]
    if expert_ptr is not None:
        mask &= (tl.load(expert_ptr + token, token < M, other=-1) >= 0)[:, None]
    x_ptr += token[:, None] * x_stride + segment * SEGMENT + feature
    y = tl.load(x_ptr, mask, other=0)
    if GATED:
        y = _silu_and_mul(y, tl.load(x_ptr + tl.num_programs(1) * SEGMENT, mask, other=0))
    if left_ptr is not None:
        y = _multiply_left(left_ptr, y, SIGNS, ROWS * BLOCKS_PADDED, OUTER, OUTER_PADDED, INNER_PADDED)
    y = y.to(tl.float32)
    if HADAMARD:
        y = once(butterflies(y, LINES, 1, INNER_PADDED))
    if right_ptr is not None:
        right = _pad_depth(_matrix(right_ptr, INNER, INNER_PADDED))
        y = tl.dot(tl.trans(_pad_depth(tl.trans(y))), right, input_precision="tf32x3")

    REST: tl.constexpr = FACTOR if mean_ptr is None else 1.0
    if mean_ptr is not None:
        y = y * FACTOR - tl.load(mean_ptr + segment * SEGMENT + feature, mask, other=0)

    COUNT: tl.constexpr = LINES * INNER_PADDED // ROWS // GROUP_PADDED
    y = tl.reshape(y, (ROWS, COUNT, GROUP_PADDED))
    low, high = amin(y, 2) * REST, amax(y, 2) * REST  # as if y had been multiplied: that keeps the order
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    group, group_mask = _groups(COUNT, GROUPS, BLOCKS, BLOCKS_PADDED)
    group, group_mask = segment * GROUPS + group, group_mask & (m < M)
    if expert_ptr is not None:
        expert = tl.load(expert_ptr + m, m < M, other=-1)
        group, group_mask = expert * (tl.num_programs(1) * GROUPS) + group, group_mask & (expert >= 0)
    scale, step, inverse, zero = _scales(low, high, clip_ptr, group, group_mask, NUM_BITS, SYMMETRIC)
    if EXACT_FACTOR:
        inverse *= REST
    else:
        y *= REST
    values = _stored_values(y, inverse[:, :, None], zero[:, :, None], NUM_BITS)
    if GROUPS > 1:
        values = (values - MAGIC) * (step * tl.div_rn(1.0, scale))[:, :, None] + MAGIC
    values = tl.reshape(values.to(tl.int32, bitcast=True) - MAGIC_BITS, (LINES, INNER_PADDED))
    _store_scales(scale_ptr, zp_offset_ptr, scale, zero, segment, m, m < M, M, NUM_BITS)
    target = values_ptr + segment * SEGMENT_PADDED + feature
    if NUM_BITS == 16:
        high_byte, values = values >> 8, (values & 255) - 128
        tl.store(target + 2 * token[:, None] * values_stride, high_byte.to(tl.int8), mask)
        tl.store(target + (2 * token[:, None] + 1) * values_stride, values.to(tl.int8), mask)
        if sums_ptr is not None:
            rows = sums_ptr + (segment * M + m) * 2
            tl.store(rows, _sums(high_byte, mask, ROWS), m < M)
            tl.store(rows + 1, _sums(values, mask, ROWS), m < M)
    else:
        tl.store(target + token[:, None] * values_stride, values.to(tl.int8), mask)
        if sums_ptr is not None:
            tl.store(sums_ptr + segment * M + m, _sums(values, mask, ROWS), m < M)


@triton.jit
def _silu_and_mul(gate, up):
    """Return silu(gate) * up; both factors and the product are rounded to their dtype, as the reference's."""
    wide = gate.to(tl.float32)
    silu = narrow(wide / (1 + tl.exp(-wide)), gate.dtype).to(tl.float32)
    return narrow(silu * up.to(tl.float32), gate.dtype)


@triton.jit
def _groups(COUNT: tl.constexpr, GROUPS: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr):
    """Return a segment's groups [1, COUNT] in the order of a program's elements, and which of them there are."""
    index = tl.arange(0, COUNT)[None, :]
    mask = index < GROUPS
    if BLOCKS > 1 and GROUPS % BLOCKS == 0:  # padding lies behind each block
        within = index % (COUNT // BLOCKS_PADDED)
        index = index // (COUNT // BLOCKS_PADDED) * (GROUPS // BLOCKS) + within
        mask = (within < GROUPS // BLOCKS) & (index < GROUPS)
    return index, mask


@triton.jit
def _sums(values, mask, ROWS: tl.constexpr):
    """Sum the values of each token: int32 [ROWS, 1]."""
    return tl.sum(tl.reshape(tl.where(mask, values, 0), (ROWS, values.numel // ROWS)), 1)[:, None]


@triton.jit
def _multiply_left(
    left_ptr,
    x,
    SIGNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    OUTER: tl.constexpr,
    OUTER_PADDED: tl.constexpr,
    INNER_PADDED: tl.constexpr,
):
    """Multiply each block X of x [BLOCKS * OUTER_PADDED, INNER_PADDED] to left^T X, in one product side by side.

    SIGNS: left's entries are +-1, so that x can stay in its 16 bits (not in the interpreter's dot).
    """
    left = tl.trans(_pad_depth(_matrix(left_ptr, OUTER, OUTER_PADDED)))
    if SIGNS and not INTERPRETED:
        left = left.to(x.dtype)
    else:
        x = x.to(tl.float32)
    blocks = tl.permute(tl.reshape(x, (BLOCKS, OUTER_PADDED, INNER_PADDED)), (1, 0, 2))
    blocks = _pad_depth(tl.reshape(blocks, (OUTER_PADDED, BLOCKS * INNER_PADDED)))
    product = tl.dot(left, blocks, input_precision="tf32x3")
    blocks = tl.permute(tl.reshape(product, (OUTER_PADDED, BLOCKS, INNER_PADDED)), (1, 0, 2))
    return tl.reshape(blocks, (BLOCKS * OUTER_PADDED, INNER_PADDED))


@triton.jit
def _matrix(ptr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Load a matrix [SIZE, SIZE] float32, padded with zeros."""
    index = tl.arange(0, PADDED)
    mask = index < SIZE
    return tl.load(ptr + index[:, None] * SIZE + index[None, :], mask[:, None] & mask[None, :], other=0)


@triton.jit
def _pad_depth(x):
    """Pad x [k, n] with rows of zeros to the depth of a product on tensor cores."""
    for _ in tl.static_range(4):
        if x.shape[0] < DEPTH:
            x = tl.reshape(tl.permute(tl.join(x, tl.zeros_like(x)), (2, 0, 1)), (2 * x.shape[0], x.shape[1]))
    return x


@triton.jit
def _scales(low, high, clip_ptr, group, mask, NUM_BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Quantize ranges low..high [rows, groups] of a segment; clip_ptr [groups, 2] are clip ratios of both ends.

    Returns the segment's scale [rows, 1], and of each group step, 1 / step and the zero-point, all float32. 16 bits are
    symmetric, unclipped and have 32767 steps to the largest magnitude. A NaN in a range makes the scale NaN, and so
    every output that is multiplied with it, as in the reference.
    """
    low, high = minimum(low, 0.0), maximum(high, 0.0)
    if NUM_BITS != 16:
        low *= tl.load(clip_ptr + 2 * group, mask, other=0)
        high *= tl.load(clip_ptr + 2 * group + 1, mask, other=0)
    largest: tl.constexpr = 2.0**NUM_BITS - 1
    half: tl.constexpr = 2.0 ** (NUM_BITS - 1)
    if SYMMETRIC:
        step = maximum(tl.div_rn(maximum(-low, high), half - 1), 1e-12)
        inverse = tl.div_rn(1.0, step)
        zero = tl.zeros_like(step) + half
    else:
        step = maximum(tl.div_rn(high - low, largest), 1e-12)
        inverse = tl.div_rn(1.0, step)
        zero = -low * inverse + MAGIC - MAGIC
    scale = step
    if group.shape[1] > 1:
        needed = tl.where(mask, step * maximum(zero, largest - zero), 0)
        scale = tl.div_rn(amax(needed, 1), LARGEST_VALUE)[:, None]
    return scale, step, inverse, zero


@triton.jit
def _stored_values(y, inverse, zero, NUM_BITS: tl.constexpr):
    """Quantize y to the bits of MAGIC plus an integer: at 4 bits code - zero, else code - 2^(NUM_BITS - 1)."""
    bound = MAGIC - zero
    code = tl.minimum(tl.maximum(y * inverse + MAGIC, bound), bound + (2.0**NUM_BITS - 1))
    return code if NUM_BITS == 4 else code + (zero - 2.0 ** (NUM_BITS - 1))


@triton.jit
def _store_scales(scale_ptr, zp_offset_ptr, scale, zero, segment, m, mask, M, NUM_BITS: tl.constexpr):
    """Store scale and, at 8 bits, zero - 128 in row `segment` of [segments, M]; at 16 bits both bytes' rows."""
    if NUM_BITS == 16:
        offset = (segment * M + m) * 2
        tl.store(scale_ptr + offset, scale * 256, mask)
        tl.store(scale_ptr + offset + 1, scale, mask)
        tl.store(zp_offset_ptr + offset, tl.zeros_like(scale).to(tl.int32), mask)
        tl.store(zp_offset_ptr + offset + 1, tl.zeros_like(scale).to(tl.int32) - 128, mask)
    else:
        tl.store(scale_ptr + segment * M + m, scale, mask)
        if zp_offset_ptr is not None:
            tl.store(zp_offset_ptr + segment * M + m, zero.to(tl.int32) - 128, mask)
