"""Products with unquantized matrices: lm_head, and R1 applied online in tied models."""

import torch
import torch.nn.functional as F


def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply x [tokens, K] by weight [N, K] of the same dtype; return [tokens, N] in that dtype."""
    return F.linear(x, weight)


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """Return rows [tokens, H] @ rotation [H, H] float32, times gain [H] where given, in the dtype of rows.

    Sums in float64, because the order of torch's float32 sums depends on the number of rows. The compiled library
    sums in float32 in the order of the features, so float32 results differ in the last bits.
    """
    out = (rows.double() @ rotation.double()).float()
    return (out if gain is None else out.mul_(gain)).to(rows.dtype)
