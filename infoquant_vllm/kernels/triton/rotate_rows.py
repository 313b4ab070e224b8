"""Rows into or out of the rotated residual basis: torch's own product; semantics: kernels/reference/rotate_rows.py."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """As the reference, but for last bits of float32: in which order is summed the library decides."""
    with _full_precision():
        out = rows.float() @ rotation
    return (out if gain is None else out.mul_(gain)).to(rows.dtype)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 as float32, where VLLM_FLOAT32_MATMUL_PRECISION allows the 11 bits of TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
