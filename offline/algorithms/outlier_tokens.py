"""Which tokens of a calibration text are outliers: InfoQuant's adaptive selection (arXiv 2605.26175).

Outliers that come with a token's position, as those of a text's first token, are in all sequences
alike; ordinary large values are scattered. As the threshold rises the share of scattered ones
settles, and there the tokens above it are taken.
"""

import torch

SEQUENCES = 10
LARGEST_THRESHOLD = 50
SETTLED = 0.02
LARGEST_SHARE = 0.4


def outlier_weights(x: torch.Tensor, weight: float) -> torch.Tensor:
    """Weights [sequences, length] of the tokens of x [sequences, length, features]: `weight` or 1."""
    scores = token_scores(x)
    outliers = scores > select_threshold(scores[:SEQUENCES])
    return torch.where(outliers, weight, 1.0)


def token_scores(x: torch.Tensor) -> torch.Tensor:
    """A token's largest distance from its sequence's mean, in that sequence's standard deviations."""
    return torch.stack([(each - each.mean()).abs().amax(1) / each.std() for each in x])


def select_threshold(scores: torch.Tensor) -> int:
    """The threshold k on scores [sequences, length] at which scattered outliers have settled.

    r(k) = (n2 - n1) / n2 with n1 the mean number of tokens above k, n2 the number of positions
    above it in any sequence. The first k with |r(k) - r(k - 1)| < 0.02 and n2 < 0.4 of the length;
    where there is none, the first k that no token is above.
    """
    previous = None
    for k in range(LARGEST_THRESHOLD):
        above = scores > k
        positions = int(above.any(0).sum())
        if positions == 0:
            return k
        ratio = 1 - above.sum().item() / len(scores) / positions
        settled = previous is not None and abs(ratio - previous) < SETTLED
        if settled and positions < LARGEST_SHARE * scores.shape[1]:
            return k
        previous = ratio
    return LARGEST_THRESHOLD
