"""From integer sums of products to a linear's output, tiles of [tokens, channels]; rounded in the reference's order."""

import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.nibbles import FACTOR
from infoquant_vllm.kernels.triton.rounding import narrow

_FACTOR = tl.constexpr(FACTOR)


@triton.jit
def row(ptr, group, size, index, mask):
    """Entries `index` of row `group` of ptr [groups, size]."""
    return tl.load(ptr + group * size + index, mask=mask, other=0)


@triton.jit
def correct(
    total,
    group,
    input_group,
    weight_group,
    m,
    n,
    m_mask,
    n_mask,
    M,
    N,
    rest_ptr,
    sums_ptr,
    weight_sums_ptr,
    weight_zero_ptr,
    GROUP_SIZE,
    WEIGHT_BITS: tl.constexpr,
):
    """sum (code - rest) * (weight - zero) of a group, times FACTOR at 4 bits, from total = sum code * weight.

    total [tokens, channels] int32. Of what it lacks, rest * sum(weight) and zero * sum(code - rest), the sums are kept
    with the codes and with the weights.
    """
    UNIT: tl.constexpr = _FACTOR if WEIGHT_BITS == 4 else 1
    if rest_ptr is not None:
        rest = row(rest_ptr, input_group, M, m, m_mask) * UNIT
        total -= rest[:, None] * row(weight_sums_ptr, group, N, n, n_mask).to(tl.int32)[None, :]
    if weight_zero_ptr is not None:
        zero = row(weight_zero_ptr, weight_group, N, n, n_mask).to(tl.int32) - (1 << (WEIGHT_BITS - 1))
        sums = row(sums_ptr, group, M, m, m_mask) * UNIT
        if rest_ptr is not None:
            sums -= rest * GROUP_SIZE
        total -= sums[:, None] * zero[None, :]
    return total


@triton.jit
def weight_sums(weight_ptr, N, weight_stride, SUM_BITS: tl.constexpr):
    """Where the sums of a weight from `prepare_weight` begin: behind its rows."""
    ptr = weight_ptr + N.to(tl.int64) * weight_stride
    return ptr.to(tl.pointer_type(tl.int16 if SUM_BITS == 16 else tl.int32), bitcast=True)


@triton.jit
def finish(
    out,
    first,
    n,
    n_mask,
    M,
    N,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    BLOCK_M: tl.constexpr,
    WEIGHT_SPAN: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Store out [BLOCK_M rows from `first`, channels] float32 times the scale of a channel, where it has but one.

    With PAIRS rows 2t and 2t + 1 are the high and the low bytes of token t, and are added. Then comes the bias.
    """
    if WEIGHT_SPAN == 0:
        out *= tl.load(weight_scale_ptr + n, n_mask, other=0)[None, :]
    if WEIGHT_BITS == 4:
        out *= 1.0 / _FACTOR
    ROWS: tl.constexpr = 2 if PAIRS else 1
    if PAIRS:
        out = tl.sum(tl.reshape(out, (BLOCK_M // 2, 2, out.shape[1])), 1)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + n, n_mask, other=0).to(tl.float32)[None, :]
    token = first // ROWS + tl.arange(0, BLOCK_M // ROWS)
    target = token.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + target, narrow(out, out_ptr.dtype.element_ty), (token < M // ROWS)[:, None] & n_mask[None, :])
