"""Weights that make up for the rounding of a sequence's first token, the attention sink.

In most models the first token becomes a sink of attention: a few of its features are thousands of times larger than
any other (Sun et al., arXiv 2402.17762), and every later token attends to it. After a rotation its inputs are nearly
the same in all sequences, and most of them lie at the ends of their range, so clipping takes a tenth of them away: an
error that does not average out, which every layer passes on. But since the rounded inputs are known beforehand, weights
can make up for it.
"""

from dataclasses import dataclass

import torch

DAMPENING_FRAC = 0.01
"""Added to the diagonal of the Hessian, as a share of its mean."""
SMALLEST = 1e-9
"""Added to the matrix that is solved, as a share of its diagonal's mean: first tokens may be equal."""


@dataclass(frozen=True)
class Sinks:
    """Inputs of first tokens [sequences, features] float32, as they are and as the server rounds them.

    weights: of their squared errors against those of other tokens, [sequences]
    """

    exact: torch.Tensor
    rounded: torch.Tensor
    weights: torch.Tensor

    def correction(self, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        """Return D [N, K] that minimizes the errors of first tokens' outputs and what D changes for other tokens.

        With X exact and Q rounded inputs, S = diag(weights), and H the Hessian of the other tokens, of which only the
        diagonal is read, D minimizes |((W + D) Q^T - W X^T) S^(1/2)|^2 + tr(D diag(H) D^T). Solved by Woodbury's
        identity in matrices of as many rows as there are sequences.
        """
        diagonal = hessian.diagonal().double().clamp(min=0)
        diagonal = diagonal + (DAMPENING_FRAC * diagonal.mean()).clamp(min=torch.finfo(torch.float32).tiny)
        root = self.weights.double().sqrt()[:, None]
        rounded = self.rounded.double() * root
        square = (rounded / diagonal) @ rounded.T
        square.diagonal().add_(1 + SMALLEST * square.diagonal().mean())
        lost = ((self.exact - self.rounded).double() * root) @ weight.double().T
        return (torch.linalg.solve(square, lost).T @ (rounded / diagonal)).float()

    def added_to(self, hessian: torch.Tensor) -> torch.Tensor:
        """Add the rounded inputs, weighted, to the Hessian of the other tokens, in place."""
        return hessian.addmm_((self.rounded * self.weights[:, None]).T, self.rounded)
