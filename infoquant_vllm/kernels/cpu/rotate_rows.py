"""Rows into or out of the rotated residual basis; semantics: kernels/reference/rotate_rows.py."""

import torch


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """As the reference, of which it differs in not copying as much."""
    out = (rows.double() @ rotation.double()).float()
    return (out if gain is None else out.mul_(gain)).to(rows.dtype)
