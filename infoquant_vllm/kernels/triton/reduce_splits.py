"""The second half of a product whose features were split among programs: their sums added, always in one order."""

from typing import Any

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.codes import Codes
from infoquant_vllm.kernels.triton.epilogue import correct, finish, weight_sums

BLOCK_M, BLOCK_N = 4, 256


@triton.jit(do_not_specialize=["M", "features"])
def reduce_splits_kernel(
    partial_ptr,
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
    weight_stride,
    features,
    GROUPED: tl.constexpr,
    WEIGHT_SPAN: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    SUM_BITS: tl.constexpr,
    PAIRS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [M, N], with PAIRS [M / 2, N], from partial [SPLITS, M, N]; the rest as in `int4_linear_kernel`.

    Sums of one group are integers, so the order of adding shows nowhere; those of more are float32 and differ
    from an unsplit product's in last bits, the same ones in every run.
    """
    first = tl.program_id(1) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    mask = m_mask[:, None] & n_mask[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    out = tl.load(partial_ptr + place, mask, other=0)
    for split in tl.static_range(1, SPLITS):
        out += tl.load(partial_ptr + split * M.to(tl.int64) * N + place, mask, other=0)
    if not GROUPED:
        sums = weight_sums(weight_ptr, N, weight_stride, SUM_BITS)
        pointers = rest_ptr, sums_ptr, sums, weight_zero_ptr
        out = correct(out, 0, 0, 0, m, n, m_mask, n_mask, M, N, *pointers, features, WEIGHT_BITS)
        out = out.to(tl.float32) * tl.load(scale_ptr + m, m_mask, other=0)[:, None]
    finish(out, first, n, n_mask, M, N, weight_scale_ptr, bias_ptr, out_ptr, BLOCK_M, WEIGHT_SPAN, WEIGHT_BITS, PAIRS)


def reduce_splits(
    partial: torch.Tensor,
    codes: Codes,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    numbers: tuple[int, ...],
    constants: dict[str, Any],
) -> None:
    """Fill out [tokens, N] from partial [splits, rows, N].

    numbers: bytes of a row of weights, features; constants: GROUPED, WEIGHT_SPAN, WEIGHT_BITS, SUM_BITS, PAIRS.
    """
    splits, rows, channels = partial.shape
    reduce_splits_kernel[-(-channels // BLOCK_N), -(-rows // BLOCK_M)](
        partial,
        *codes[1:],
        weight,
        weight_scale,
        weight_zero,
        bias,
        out,
        rows,
        channels,
        *numbers,
        SPLITS=splits,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        **constants,
        num_warps=4,
        enable_fp_fusion=False,
    )
