"""Rows into or out of the rotated residual basis of a tied model."""

import torch


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """rows [tokens, H] @ rotation [H, H], times gain [H] where given, in the dtype of rows.

    In float32: the products are summed in the order of the features, each product and each sum rounded.
    """
    sums = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    for column, row in zip(rows.float().T, rotation, strict=True):
        sums += column[:, None] * row
    return (sums if gain is None else sums * gain).to(rows.dtype)
