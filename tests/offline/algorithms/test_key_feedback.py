"""Error feedback: codes of keys lose less of what queries see, at any position."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from infoquant_vllm.format import hadamard
from infoquant_vllm.kernels.torch.quantize import quantize_kv
from offline.algorithms.key_feedback import feedback_matrix, log_spaced_positions, mean_rotated_moment

HEADS, SIZE = 2, 64


def queries(tokens: int = 512) -> torch.Tensor:
    """Queries [heads, tokens, size] whose features differ in size and go together."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(HEADS, SIZE, SIZE, generator=generator) * torch.logspace(0, 1.5, SIZE)[:, None]
    return torch.randn(HEADS, tokens, SIZE, generator=generator) @ mixed


def score_error(keys: torch.Tensor, seen_by: torch.Tensor, feedback: torch.Tensor | None) -> float:
    codes, scale, zero = quantize_kv(keys, torch.ones(2), 4, None if feedback is None else feedback[:, None])
    stored = codes * scale.float()[..., None] + zero.float()[..., None]
    return ((stored - keys) @ seen_by.mT).square().mean().item()


@pytest.mark.parametrize("transformed", [False, True])
def test_scores_lose_less_than_by_rounding_to_nearest(transformed: bool) -> None:
    seen_by = queries()
    keys = torch.randn(HEADS, 256, SIZE, generator=torch.Generator().manual_seed(1))
    feedback = feedback_matrix(seen_by.mT @ seen_by, transformed)
    assert torch.equal(feedback, feedback.triu(1))
    matrix = hadamard(SIZE).float() if transformed else torch.eye(SIZE)
    nearest, found = (score_error(keys @ matrix, seen_by @ matrix, each) for each in (None, feedback))
    assert found < 0.6 * nearest


def test_without_feedback_codes_are_those_of_rounding_to_nearest() -> None:
    keys = torch.randn(HEADS, 8, SIZE, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(HEADS, 1, SIZE, SIZE)
    found, expected = quantize_kv(keys, torch.ones(2), 4, zeros), quantize_kv(keys, torch.ones(2), 4)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_queries_that_are_all_zero_feed_nothing_back() -> None:
    assert not feedback_matrix(torch.zeros(HEADS, SIZE, SIZE), True).any()


def test_the_mean_moment_is_that_of_rotated_queries() -> None:
    positions, x = torch.tensor([0, 3, 500]), queries(16)
    angles = positions[:, None] * 100.0 ** -(torch.arange(SIZE // 2) / (SIZE // 2))
    cos, sin = (part.repeat(1, 2) for part in (angles.cos(), angles.sin()))
    expected = torch.zeros(HEADS, SIZE, SIZE)
    for one_cos, one_sin in zip(cos, sin, strict=True):
        rotated, _ = apply_rotary_pos_emb(x[None], x[None], one_cos[None, None], one_sin[None, None])
        expected += rotated[0].mT @ rotated[0] / len(positions)
    found = mean_rotated_moment(x.mT @ x, cos, sin)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("count", [1, 100, 512, 8192, 131_072])
def test_positions_are_those_of_the_model_and_reach_its_last(count: int) -> None:
    found = log_spaced_positions(count)
    assert found[0] == 0
    assert found[-1] == count - 1
    assert torch.equal(found, found.sort().values)
    assert (found < 512).float().mean() >= 0.1
