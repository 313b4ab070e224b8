"""Rows into or out of the rotated residual basis; semantics: kernels/reference/rotate_rows.py."""

import torch


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """As the reference; float64, so that the result in the model's dtype does not depend on the batch."""
    out = rows.double() @ rotation
    return (out if gain is None else out.mul_(gain)).to(rows.dtype)
