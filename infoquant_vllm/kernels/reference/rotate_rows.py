"""Rows into or out of the rotated residual basis of a tied model."""

import torch


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """rows [tokens, H] @ rotation [H, H], times gain [H] where given, in the dtype of rows."""
    out = rows.double() @ rotation.double()
    return (out if gain is None else out * gain.double()).to(rows.dtype)
