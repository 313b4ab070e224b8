"""The Hadamard over the features of a head, as a part of the kernels that store keys and read queries.

Operation by operation that of `infoquant_vllm.format.apply_hadamard`, so that codes are the reference's
where `enable_fp_fusion` is off.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from infoquant_vllm.format import hadamard_dense


@triton.jit
def hadamard_rows(
    x, factor_ptr, norm, ROWS: tl.constexpr, SIZE: tl.constexpr, ORDER: tl.constexpr, LOG_N: tl.constexpr
):
    """x [ROWS, SIZE] float32 through butterflies over 2**LOG_N features, then the dense factor [ORDER, ORDER].

    SIZE is a power of two; features beyond ORDER * 2**LOG_N are zeros and come out as zeros. norm: 1 / sqrt(head size).
    """
    N: tl.constexpr = 2**LOG_N
    PADDED: tl.constexpr = SIZE // N
    for _ in tl.static_range(LOG_N):
        # Neighbours meet; sums go to the first half, differences to the second, and after LOG_N steps all are back.
        a, b = tl.split(tl.reshape(x, [ROWS, PADDED, N // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [ROWS, SIZE])
    if ORDER > 1:
        y = tl.reshape(x, [ROWS, PADDED, N])
        entries = tl.arange(0, PADDED)
        total = tl.zeros([ROWS, PADDED, N], tl.float32)
        for i in tl.static_range(ORDER):  # the format sums from left to right
            row = tl.load(factor_ptr + i * ORDER + entries, mask=entries < ORDER, other=0.0)
            entry = tl.sum(tl.where(entries[None, :, None] == i, y, 0.0), 1)
            total += row[None, :, None] * entry[:, None, :]
        x = tl.reshape(total, [ROWS, SIZE])
    return x * norm


@cache
def dense_factor(size: int, device: torch.device) -> torch.Tensor:
    """The dense factor of a head of `size`, [order, order] float32, made once per device."""
    return hadamard_dense(size).to(device, torch.float32).contiguous()


def hadamard_sizes(size: int, enabled: bool) -> tuple[int, int]:
    """ORDER and LOG_N of `hadamard_rows`; without a Hadamard 1 and 0."""
    if not enabled:
        return 1, 0
    order = len(hadamard_dense(size))
    return order, (size // order).bit_length() - 1
