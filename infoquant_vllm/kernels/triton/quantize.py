"""Kernels that transform activations and quantize them in one pass; formulas of kernels/torch/quantize.py.

`rotate_quantize_kernel` holds whole rows in registers: they are read once, and codes written once. In
`rotate_blocks_kernel`, for learned blocks, a program makes a group's codes of a few tokens. Where a group is wider than
a tile of columns its range is found first and the product done again for the codes: twice the work on tensor cores
instead of rotated rows in memory.
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
    once,
)

DEPTH = tl.constexpr(16)  # features that a product on tensor cores sums at the least


@triton.jit(do_not_specialize=["M"])
def rotate_quantize_kernel(
    x_ptr,
    left_ptr,
    right_ptr,
    clip_ptr,
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
    GROUP_SIZE: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SUM_SIZE: tl.constexpr,
    SUM_PADDED: tl.constexpr,
    NUM_BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Transform and quantize segments of BLOCKS * OUTER * INNER features of ROWS tokens.

    x [M, x_stride]; a segment's block X [OUTER, INNER] becomes left^T X right: butterflies in place of right for a
    Hadamard (times FACTOR in the end), left [OUTER, OUTER] its base matrix or a Kronecker pair's first, each of them
    None if absent. The base matrix goes first, when x still has 16 bits: its entries are +-1 (SIGNS) or the Hartley
    matrix's. Other products are float32 in three TF32 steps. clip [groups, 2]; values [rows, values_stride] int8,
    scale, zp_offset [groups, rows], sums [finer groups, rows] as in `Codes`. A token has one row, at 16 bits two: of
    high and of low bytes.
    """
    SEGMENT: tl.constexpr = BLOCKS * OUTER * INNER
    LINES: tl.constexpr = ROWS * BLOCKS_PADDED * OUTER_PADDED
    line, inner = tl.arange(0, LINES), tl.arange(0, INNER_PADDED)
    outer, block = line % OUTER_PADDED, line // OUTER_PADDED % BLOCKS_PADDED
    token = (tl.program_id(0) * ROWS + line // (OUTER_PADDED * BLOCKS_PADDED)).to(tl.int64)
    feature = tl.program_id(1) * SEGMENT + ((block * OUTER + outer) * INNER)[:, None] + inner[None, :]
    mask = ((token < M) & (outer < OUTER) & (block < BLOCKS))[:, None] & (inner < INNER)[None, :]
    y = tl.load(x_ptr + token[:, None] * x_stride + feature, mask, other=0)
    if left_ptr is not None:
        y = _multiply_left(left_ptr, y, SIGNS, ROWS * BLOCKS_PADDED, OUTER, OUTER_PADDED, INNER_PADDED)
    y = y.to(tl.float32)
    if HADAMARD:
        y = once(butterflies(y, LINES, 1, INNER_PADDED))
    if right_ptr is not None:
        right = _pad_depth(_matrix(right_ptr, INNER, INNER_PADDED))
        y = tl.dot(tl.trans(_pad_depth(tl.trans(y))), right, input_precision="tf32x3")

    COUNT: tl.constexpr = LINES * INNER_PADDED // ROWS // GROUP_PADDED
    y = tl.reshape(y, (ROWS, COUNT, GROUP_PADDED))
    low, high = amin(y, 2) * FACTOR, amax(y, 2) * FACTOR  # as if y had been multiplied: that keeps the order
    m, group, group_mask = _groups(M, ROWS, COUNT, SEGMENT // GROUP_SIZE, BLOCKS, BLOCKS_PADDED)
    scale, inverse, zero = scale_and_zero(low, high, clip_ptr, group, group_mask, NUM_BITS, SYMMETRIC)
    if EXACT_FACTOR:
        inverse *= FACTOR
    else:
        y *= FACTOR
    codes = stored_codes(y, inverse[:, :, None], zero[:, :, None], NUM_BITS)
    codes = tl.reshape(codes, (LINES, INNER_PADDED))
    store_scales(scale_ptr, zp_offset_ptr, scale, zero, group, m, group_mask, M, NUM_BITS)
    values, blocks = values_ptr + feature, (BLOCKS, BLOCKS_PADDED)
    if NUM_BITS == 16:
        high_byte, codes = codes >> 8, (codes & 255) - 128
        tl.store(values + 2 * token[:, None] * values_stride, high_byte.to(tl.int8), mask)
        tl.store(values + (2 * token[:, None] + 1) * values_stride, codes.to(tl.int8), mask)
        if sums_ptr is not None:
            _store_sums(sums_ptr, high_byte, mask, M, 2, 0, ROWS, SEGMENT, SUM_SIZE, SUM_PADDED, *blocks)
            _store_sums(sums_ptr, codes, mask, M, 2, 1, ROWS, SEGMENT, SUM_SIZE, SUM_PADDED, *blocks)
    else:
        tl.store(values + token[:, None] * values_stride, codes.to(tl.int8), mask)
        if sums_ptr is not None:
            _store_sums(sums_ptr, codes, mask, M, 1, 0, ROWS, SEGMENT, SUM_SIZE, SUM_PADDED, *blocks)


@triton.jit
def _groups(
    M,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
):
    """Return this program's tokens [ROWS, 1], its groups [1, COUNT], and which are in bounds [ROWS, COUNT]."""
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    index = tl.arange(0, COUNT)[None, :]
    mask = index < GROUPS
    if BLOCKS > 1 and GROUPS % BLOCKS == 0:  # padding lies behind each block
        within = index % (COUNT // BLOCKS_PADDED)
        index = index // (COUNT // BLOCKS_PADDED) * (GROUPS // BLOCKS) + within
        mask = (within < GROUPS // BLOCKS) & (index < GROUPS)
    return m, tl.program_id(1) * GROUPS + index, (m < M) & mask


@triton.jit
def _store_sums(
    sums_ptr,
    codes,
    mask,
    M,
    ROWS_PER_TOKEN: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SUM_SIZE: tl.constexpr,
    SUM_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
):
    """Store the sums of each token's codes over groups of SUM_SIZE features."""
    COUNT: tl.constexpr = codes.numel // ROWS // SUM_PADDED
    m, group, group_mask = _groups(M, ROWS, COUNT, SEGMENT // SUM_SIZE, BLOCKS, BLOCKS_PADDED)
    sums = tl.sum(tl.reshape(tl.where(mask, codes, 0), (ROWS, COUNT, SUM_PADDED)), 2)
    tl.store(sums_ptr + (group * M + m) * ROWS_PER_TOKEN + ROW, sums, group_mask)


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


@triton.jit(do_not_specialize=["M"])
def rotate_blocks_kernel(
    x_ptr,
    blocks_ptr,
    clip_ptr,
    values_ptr,
    scale_ptr,
    zp_offset_ptr,
    sums_ptr,
    M,
    x_stride,
    values_stride,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SUM_SIZE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute y[:, j] = x[:, block] @ blocks[block] for the GROUP_SIZE columns j of a group, then quantize them.

    blocks [K / BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE] float32, products in three TF32 steps; the other arguments are
    those of `rotate_quantize_kernel`. COLUMNS divides BLOCK_SIZE, GROUP_SIZE and SUM_SIZE, BLOCK_K divides BLOCK_SIZE.
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_mask = m < M
    group = tl.program_id(1)
    rows = x_ptr + (m % M).to(tl.int64)[:, None] * x_stride
    first = group * GROUP_SIZE
    y = _columns(rows, blocks_ptr, first, BLOCK_SIZE, ROWS, COLUMNS, BLOCK_K)
    low, high = amin(y, 1), amax(y, 1)
    for column in tl.range(first + COLUMNS, first + GROUP_SIZE, COLUMNS):
        y = _columns(rows, blocks_ptr, column, BLOCK_SIZE, ROWS, COLUMNS, BLOCK_K)
        low, high = minimum(low, amin(y, 1)), maximum(high, amax(y, 1))
    scale, inverse, zero = scale_and_zero(low, high, clip_ptr, group + tl.zeros_like(m), m_mask, NUM_BITS, SYMMETRIC)
    store_scales(scale_ptr, zp_offset_ptr, scale, zero, group, m, m_mask, M, NUM_BITS)
    for part in tl.range(GROUP_SIZE // SUM_SIZE):
        high_sum, low_sum = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
        for column in tl.range(first + part * SUM_SIZE, first + (part + 1) * SUM_SIZE, COLUMNS):
            if GROUP_SIZE > COLUMNS:
                y = _columns(rows, blocks_ptr, column, BLOCK_SIZE, ROWS, COLUMNS, BLOCK_K)
            codes = stored_codes(y, inverse[:, None], zero[:, None], NUM_BITS)
            target = values_ptr + column + tl.arange(0, COLUMNS)[None, :]
            if NUM_BITS == 16:
                high_byte, codes = codes >> 8, (codes & 255) - 128
                row = target + 2 * m.to(tl.int64)[:, None] * values_stride
                tl.store(row, high_byte.to(tl.int8), m_mask[:, None])
                tl.store(row + values_stride, codes.to(tl.int8), m_mask[:, None])
                high_sum += tl.sum(high_byte, 1)
            else:
                tl.store(target + m.to(tl.int64)[:, None] * values_stride, codes.to(tl.int8), m_mask[:, None])
            low_sum += tl.sum(codes, 1)
        if sums_ptr is not None:
            at = sums_ptr + (group * (GROUP_SIZE // SUM_SIZE) + part) * M * (2 if NUM_BITS == 16 else 1)
            if NUM_BITS == 16:
                tl.store(at + 2 * m, high_sum, m_mask)
                tl.store(at + 2 * m + 1, low_sum, m_mask)
            else:
                tl.store(at + m, low_sum, m_mask)


@triton.jit
def _columns(
    rows, blocks_ptr, column, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Compute columns of rotated rows: [ROWS, COLUMNS] float32."""
    block = column // BLOCK_SIZE
    depth, inner = tl.arange(0, BLOCK_K), column % BLOCK_SIZE + tl.arange(0, COLUMNS)
    matrix = blocks_ptr + (block * BLOCK_SIZE + depth).to(tl.int64)[:, None] * BLOCK_SIZE + inner[None, :]
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, BLOCK_SIZE, BLOCK_K):
        x = tl.load(rows + block * BLOCK_SIZE + k + depth[None, :]).to(tl.float32)
        y = tl.dot(x, tl.load(matrix + k * BLOCK_SIZE), y, input_precision="tf32x3")
    return y


@triton.jit
def scale_and_zero(low, high, clip_ptr, group, mask, NUM_BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Compute (scale, 1 / scale, zero) float32 of ranges low..high; clip_ptr [groups, 2] are clip ratios of both ends.

    16 bits are symmetric, unclipped and have 32767 steps to the largest magnitude. A NaN in the range makes the scale
    NaN, and so every output that is multiplied with it, as in the reference.
    """
    low, high = minimum(low, 0.0), maximum(high, 0.0)
    if NUM_BITS != 16:
        low *= tl.load(clip_ptr + 2 * group, mask, other=0)
        high *= tl.load(clip_ptr + 2 * group + 1, mask, other=0)
    if SYMMETRIC:
        largest: tl.constexpr = 2.0 ** (NUM_BITS - 1) - 1
        scale = maximum(tl.div_rn(maximum(-low, high), largest), 1e-12)
        inverse = tl.div_rn(1.0, scale)
        zero = tl.zeros_like(scale) + 2.0 ** (NUM_BITS - 1)
    else:
        steps: tl.constexpr = 2.0**NUM_BITS - 1
        scale = maximum(tl.div_rn(high - low, steps), 1e-12)
        inverse = tl.div_rn(1.0, scale)
        zero = -low * inverse + MAGIC - MAGIC
    return scale, inverse, zero


@triton.jit
def stored_codes(y, inverse, zero, NUM_BITS: tl.constexpr):
    """Quantize y to int32: at 4 bits code - zero, else code - 2^(NUM_BITS - 1)."""
    bound = MAGIC - zero
    code = tl.minimum(tl.maximum(y * inverse + MAGIC, bound), bound + (2.0**NUM_BITS - 1))
    if NUM_BITS != 4:
        code += zero - 2.0 ** (NUM_BITS - 1)
    return code.to(tl.int32, bitcast=True) - MAGIC_BITS


@triton.jit
def store_scales(scale_ptr, zp_offset_ptr, scale, zero, group, m, mask, M, NUM_BITS: tl.constexpr):
    """Store scale and, at 8 bits, zero - 128 in row `group` of [groups, M]; at 16 bits those of both bytes' rows."""
    if NUM_BITS == 16:
        offset = (group * M + m) * 2
        tl.store(scale_ptr + offset, scale * 256, mask)
        tl.store(scale_ptr + offset + 1, scale, mask)
        tl.store(zp_offset_ptr + offset, tl.zeros_like(scale).to(tl.int32), mask)
        tl.store(zp_offset_ptr + offset + 1, tl.zeros_like(scale).to(tl.int32) - 128, mask)
    else:
        tl.store(scale_ptr + group * M + m, scale, mask)
        if zp_offset_ptr is not None:
            tl.store(zp_offset_ptr + group * M + m, zero.to(tl.int32) - 128, mask)
