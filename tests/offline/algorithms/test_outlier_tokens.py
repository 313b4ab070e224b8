"""The adaptive selection takes outliers that come with their position, and no ordinary tokens."""

import torch

from offline.algorithms.outlier_tokens import outlier_weights, select_threshold, token_scores


def test_threshold_is_where_scattered_tokens_have_settled() -> None:
    scores = torch.full((10, 40), 0.5)
    scores[:, 0] = 30.0  # an outlier by its position
    scores[torch.arange(10), torch.arange(10, 20)] = 3.5  # one more in each sequence, somewhere else
    # k:   0       1, 2, 3          4 ... 29   30
    # n1:  40      2                1          0
    # n2:  40      11               1          0
    # r:   0       9 / 11           0
    # |r(1) - r(0)| = 0.82; |r(2) - r(1)| = 0 with 11 < 16 positions
    assert select_threshold(scores) == 2


def test_threshold_waits_until_few_positions_are_above_it() -> None:
    scores = torch.full((10, 40), 6.5)
    scores[:, 0] = 30.0
    # r is 0 all along, but 40 positions are above k up to 6
    assert select_threshold(scores) == 7


def test_threshold_is_above_all_tokens_where_nothing_settles() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.rand(10, 40, generator=generator)
    assert select_threshold(scores) == 4
    assert not (scores > 4).any()


def test_planted_outliers_get_the_weight_and_ordinary_tokens_one() -> None:
    x = torch.randn(12, 50, 64, generator=torch.Generator().manual_seed(1))
    x[:, 0, 3] += 60.0
    x[4, 20, 7] -= 60.0
    weights = outlier_weights(x, 30.0)
    expected = torch.ones(12, 50)
    expected[:, 0] = expected[4, 20] = 30.0
    assert torch.equal(weights, expected)


def test_score_is_the_largest_distance_in_standard_deviations() -> None:
    x = torch.tensor([[[0.0, 0.0], [0.0, 4.0]]])
    torch.testing.assert_close(token_scores(x), torch.tensor([[0.5, 1.5]]))
