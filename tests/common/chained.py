"""A product of bytes that come from a product, as attention has it, alone; `interpreted` imports it in its time."""

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.attend import multiply_int16, signed_bytes


@triton.jit
def chained_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
    MIDDLE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [ROWS, COLUMNS] = ((a @ b) & 0x7EFF) @ c, the sums as two bytes each, all operands int8."""
    row, inner, middle, column = tl.arange(0, ROWS), tl.arange(0, INNER), tl.arange(0, MIDDLE), tl.arange(0, COLUMNS)
    a = tl.load(a_ptr + row[:, None] * INNER + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * MIDDLE + middle[None, :])
    c = tl.load(c_ptr + middle[:, None] * COLUMNS + column[None, :])
    high, low = signed_bytes(tl.dot(a, b, out_dtype=tl.int32) & 0x7EFF)
    tl.store(out_ptr + row[:, None] * COLUMNS + column[None, :], multiply_int16(high, low, c, ROWS))


def chained(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns] of a [rows, inner], b [inner, middle] and c [middle, columns], sizes powers of two."""
    out = torch.empty(len(a), c.shape[1], dtype=torch.int32, device=a.device)
    chained_kernel[(1,)](a, b, c, out, *a.shape, *c.shape, num_warps=4)
    return out
