"""Learned blocks as an input transform, and the activation quantizer behind it.

A program makes a group's codes of a few tokens. Where a group is wider than a tile of columns its range is found first
and the product done again for the codes: twice the work on tensor cores instead of rotated rows in memory.
"""

from math import gcd

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.codes import Codes
from infoquant_vllm.kernels.triton.configurations import FEW_TOKENS
from infoquant_vllm.kernels.triton.extremes import amax, amin, maximum, minimum
from infoquant_vllm.kernels.triton.quantize import grid, store_rows, stored_codes


@triton.jit(do_not_specialize=["M"])
def rotate_blocks_kernel(
    x_ptr,
    blocks_ptr,
    clip_ptr,
    values_ptr,
    scale_ptr,
    rest_ptr,
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
    DEPTH: tl.constexpr,
):
    """y[:, j] = x[:, block] @ blocks[block] for the GROUP_SIZE columns j of a group, then their codes.

    blocks [K / BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE] float32, products in three TF32 steps; the rest as in
    `rotate_quantize_kernel`. COLUMNS divides BLOCK_SIZE, GROUP_SIZE and SUM_SIZE, DEPTH divides BLOCK_SIZE.
    """
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_mask = m < M
    group = tl.program_id(1)
    rows = x_ptr + (m % M).to(tl.int64)[:, None] * x_stride
    first = group * GROUP_SIZE
    y = _columns(rows, blocks_ptr, first, BLOCK_SIZE, ROWS, COLUMNS, DEPTH)
    low, high = amin(y, 1), amax(y, 1)
    for column in tl.range(first + COLUMNS, first + GROUP_SIZE, COLUMNS):
        y = _columns(rows, blocks_ptr, column, BLOCK_SIZE, ROWS, COLUMNS, DEPTH)
        low, high = minimum(low, amin(y, 1)), maximum(high, amax(y, 1))
    scale, inverse, zero = grid(low, high, clip_ptr, group + tl.zeros_like(m), m_mask, NUM_BITS, SYMMETRIC)
    store_rows(scale_ptr, rest_ptr, scale, zero, group, m, m_mask, M, NUM_BITS)
    for part in tl.range(GROUP_SIZE // SUM_SIZE):
        high_sum, low_sum = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)
        for column in tl.range(first + part * SUM_SIZE, first + (part + 1) * SUM_SIZE, COLUMNS):
            if GROUP_SIZE > COLUMNS:
                y = _columns(rows, blocks_ptr, column, BLOCK_SIZE, ROWS, COLUMNS, DEPTH)
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
    rows, blocks_ptr, column, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    """Columns of rotated rows: [ROWS, COLUMNS] float32."""
    block = column // BLOCK_SIZE
    depth, inner = tl.arange(0, DEPTH), column % BLOCK_SIZE + tl.arange(0, COLUMNS)
    matrix = blocks_ptr + (block * BLOCK_SIZE + depth).to(tl.int64)[:, None] * BLOCK_SIZE + inner[None, :]
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, BLOCK_SIZE, DEPTH):
        x = tl.load(rows + block * BLOCK_SIZE + k + depth[None, :]).to(tl.float32)
        y = tl.dot(x, tl.load(matrix + k * BLOCK_SIZE), y, input_precision="tf32x3")
    return y


def rotate_blocks(
    x: torch.Tensor, blocks: torch.Tensor, clip: torch.Tensor | None, codes: Codes, common: dict[str, int]
) -> None:
    """Fill `codes` from x [tokens, K] and blocks [K / size, size, size]; common: the quantizer's constants."""
    tokens, features = x.shape
    size, group_size = blocks.shape[1], common["GROUP_SIZE"]
    columns = gcd(size, group_size, common["SUM_SIZE"], 64)
    if columns < 16 or max(size, group_size) % min(size, group_size):
        raise ValueError(
            f"blocks of {size} and groups of {group_size} features: the Triton kernels need multiples of 16 that nest"
        )
    rows = 64 if tokens > FEW_TOKENS else 16
    rotate_blocks_kernel[triton.cdiv(tokens, rows), features // group_size](
        x,
        blocks,
        clip,
        codes.values,
        *codes[1:],
        tokens,
        x.stride(0),
        codes.values.shape[1],
        BLOCK_SIZE=size,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=gcd(size, 32),
        **common,
        num_warps=4,
        enable_fp_fusion=False,
    )
