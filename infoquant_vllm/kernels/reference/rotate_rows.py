"""Rows into or out of the rotated residual basis of a tied model."""

import torch


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """rows [tokens, H] @ rotation [H, H], times gain [H] where given, in the dtype of rows.

    Sums are in float64 and rounded to float32, as those of `rotate`; the gain comes after that.
    """
    out = (rows.double() @ rotation.double()).float()
    return (out if gain is None else out * gain).to(rows.dtype)
