"""Rows into or out of the rotated residual basis; semantics: kernels/reference/rotate_rows.py."""

import torch


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """As the reference, but for last bits of float32.

    Sums in float64, because torch's float32 products sum in an order that depends on the number of rows. A CPU
    without compiled kernels spends little of its time here.
    """
    out = (rows.double() @ rotation.double()).float()
    return (out if gain is None else out.mul_(gain)).to(rows.dtype)
