"""The clip search finds what loses least, group by group."""

from typing import Any

import pytest
import torch

from infoquant_vllm.format import ActivationArgs
from infoquant_vllm.kernels.torch.quantize import quantize_groups
from offline.algorithms.clip_search import GRID, search_clips
from offline.algorithms.fake_quantize import input_quant

BY_TOKEN = ActivationArgs(num_bits=4, symmetric=False, strategy="token")


def normal(tokens: int, features: int) -> torch.Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("features", "low", "high"), [(32, 0.97, 1.0), (64, 0.92, 0.98), (576, 0.8, 0.88)])
def test_gaussian_ranges_shrink_more_the_more_values_share_them(features: int, low: float, high: float) -> None:
    found = search_clips(normal(2000, features), BY_TOKEN)
    assert found.shape == (1, 2)
    assert low <= found.min()
    assert found.max() <= high


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "layout", [{"num_bits": 4, "strategy": "group", "group_size": 48}, {"num_bits": 8, "segment_size": 48}]
)
def test_no_other_factor_loses_less_in_any_group(layout: dict[str, Any], symmetric: bool) -> None:
    args = ActivationArgs(symmetric=symmetric, **layout)
    y = normal(300, 192) * torch.tensor([1.0, 5.0, 0.1, 1.0]).repeat_interleave(48)
    y[:, 60] *= 8
    y /= y.square().mean(1, keepdim=True).sqrt()

    def lost(clip: torch.Tensor) -> torch.Tensor:
        found = quantize_groups(y, input_quant(args, clip, 192)).dequantized()
        return (found - y.unflatten(1, (4, -1))).square().sum((0, 2))

    found = search_clips(y, args)
    best = torch.stack([lost(torch.full((4, 2), factor)) for factor in GRID]).amin(0)
    for factor in (
        found[:, 0].unique().tolist()
    ):  # groups share a scale, so others' factors can change an error a little
        chosen = found[:, 0] == factor
        assert torch.equal(lost(torch.full((4, 2), factor))[chosen], best[chosen])
    assert torch.equal(found[:, 0], found[:, 1])


def test_a_huge_token_counts_no_more_than_any_other() -> None:
    y = normal(200, 64)
    huge = y.clone()
    huge[0] *= 1e4
    assert torch.equal(search_clips(y, BY_TOKEN), search_clips(huge, BY_TOKEN))


def test_inputs_that_are_always_zero_have_factors_too() -> None:
    assert torch.equal(search_clips(torch.zeros(5, 64), BY_TOKEN), torch.ones(1, 2))
