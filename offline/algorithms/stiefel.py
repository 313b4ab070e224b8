"""Gradient descent over orthogonal matrices: the iterative Cayley transform.

J. Li et al., Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform,
arXiv 2002.01113, algorithm 1 without momentum. Matrices are [..., n, n], each stepping on its own.
"""

import torch

ITERATIONS = 5
RETRACTED_ONE_IN = 101
SMALLEST = 1e-8


def cayley_step(
    rotation: torch.Tensor, gradient: torch.Tensor, learning_rate: float, generator: torch.Generator
) -> torch.Tensor:
    """Return the rotations after one step against their `gradient`, along the manifold.

    The step size is learning_rate, or 1 / |W|_1 where that is smaller, for which the iteration contracts.
    Before it, rows are normalized, and one in RETRACTED_ONE_IN matrices, at random, is orthogonalized.
    """
    rotation = rotation / (rotation.norm(dim=-1, keepdim=True) + SMALLEST)
    drawn = torch.randint(RETRACTED_ONE_IN, (*rotation.shape[:-2], 1, 1), generator=generator) == 0
    if drawn.any():
        rotation = torch.where(drawn.to(rotation.device), retract(rotation), rotation)
    downhill = -gradient.mT
    product = downhill @ rotation
    half = product - 0.5 * rotation.mT @ (rotation @ product)
    skew = half - half.mT
    bound = 1 / (skew.abs().sum(-2).amax(-1) + SMALLEST)
    step = bound.clamp(max=learning_rate)[..., None, None]
    start = rotation.mT
    end = start + step * downhill
    for _ in range(ITERATIONS):
        end = start + step / 2 * skew @ (start + end)
    return end.mT


def retract(matrix: torch.Tensor) -> torch.Tensor:
    """Return an orthogonal matrix near an almost orthogonal one: Q of its QR decomposition by rows, signs kept."""
    q, r = torch.linalg.qr(matrix.mT)
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT
