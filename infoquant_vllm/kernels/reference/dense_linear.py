"""Product with an unquantized matrix."""

import torch


def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [tokens, K] times weight [N, K], both of one dtype, to [tokens, N] of that dtype, rounded once."""
    return (x.double() @ weight.double().T).to(x.dtype)
