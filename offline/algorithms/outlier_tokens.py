"""Select the outlier tokens of a calibration text: InfoQuant's adaptive selection (arXiv 2605.26175).

Outliers that depend on a token's position, like those of a text's first token, occur in all sequences;
ordinary large values are scattered. The threshold rises until the share of scattered tokens above it settles.
"""

import torch

SEQUENCES = 10
LARGEST_THRESHOLD = 50
SETTLED = 0.02
LARGEST_SHARE = 0.4


def outlier_weights(x: torch.Tensor, weight: float) -> torch.Tensor:
    """Return the weights [sequences, length] of the tokens of x [sequences, length, features]: `weight` or 1."""
    scores = token_scores(x)
    outliers = scores > select_threshold(scores[:SEQUENCES])
    return torch.where(outliers, weight, 1.0)


def token_scores(x: torch.Tensor) -> torch.Tensor:
    """Return each token's largest distance from its sequence's mean, in standard deviations of the sequence."""
    return torch.stack([(each - each.mean()).abs().amax(1) / each.std() for each in x])


def select_threshold(scores: torch.Tensor) -> int:
    """Return the threshold k on scores [sequences, length] at which the share of scattered outliers settles.

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
