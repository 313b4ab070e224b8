"""Rows into or out of the rotated residual basis; semantics: kernels/reference/rotate_rows.py."""

import torch

from infoquant_vllm.kernels.native.rotate_quantize import rotate


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """As the reference, bit by bit; the rotation is one block of all features, float32 and contiguous."""
    out = rotate(rows, [rotation[None]], 0)
    return (out if gain is None else out.mul_(gain)).to(rows.dtype)
