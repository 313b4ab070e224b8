"""Rows into or out of the rotated residual basis; semantics: kernels/reference/rotate_rows.py."""

import torch

from infoquant_vllm.kernels.cpu.library import operations


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """As the reference, bit by bit; rotation and gain float32."""
    return operations().rotate_rows(rows, rotation, gain)
