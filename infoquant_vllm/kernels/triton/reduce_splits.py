"""The second half of a product whose features were split among programs: their sums added, always in one order."""

import torch
import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.codes import Codes
from infoquant_vllm.kernels.triton.epilogue import correct, finish
from infoquant_vllm.kernels.triton.rounding import narrow

BLOCK_M, BLOCK_N = 4, 256


@triton.jit(do_not_specialize=["M"])
def reduce_splits_kernel(
    partial_ptr,
    scale_ptr,
    rest_ptr,
    sums_ptr,
    weight_sums_ptr,
    weight_scale_ptr,
    weight_zero_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    features,
    GROUPED: tl.constexpr,
    WEIGHT_SPAN: tl.constexpr,
    WEIGHT_BITS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [M, N] from partial [SPLITS, M, N]; the rest as in `int4_linear_kernel`.

    Sums of one group are integers, so the order of adding shows nowhere; those of more are float32 and differ
    from an unsplit product's in last bits, the same ones in every run.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    mask = m_mask[:, None] & n_mask[None, :]
    place = m[:, None] * N + n[None, :]
    out = tl.load(partial_ptr + place, mask, other=0)
    for split in tl.static_range(1, SPLITS):
        out += tl.load(partial_ptr + split * M * N + place, mask, other=0)
    if not GROUPED:
        pointers = rest_ptr, sums_ptr, weight_sums_ptr, weight_zero_ptr
        out = correct(out, 0, 0, 0, m, n, m_mask, n_mask, M, N, *pointers, features, WEIGHT_BITS)
        out = out.to(tl.float32) * tl.load(scale_ptr + m, m_mask, other=0)[:, None]
    out = finish(out, n, n_mask, weight_scale_ptr, bias_ptr, WEIGHT_SPAN, WEIGHT_BITS)
    tl.store(out_ptr + place, narrow(out, out_ptr.dtype.element_ty), mask)


def reduce_splits(
    partial: torch.Tensor,
    codes: Codes,
    features: int,
    weight_sums: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    constants: dict[str, int],
) -> None:
    """Fill out [tokens, N] from partial [splits, tokens, N]; constants: WEIGHT_SPAN and WEIGHT_BITS."""
    splits, tokens, channels = partial.shape
    reduce_splits_kernel[triton.cdiv(channels, BLOCK_N), triton.cdiv(tokens, BLOCK_M)](
        partial,
        *codes[1:],
        weight_sums,
        weight_scale,
        weight_zero,
        bias,
        out,
        tokens,
        channels,
        features,
        GROUPED=partial.dtype == torch.float32,
        SPLITS=splits,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        **constants,
        num_warps=4,
        enable_fp_fusion=False,
    )
