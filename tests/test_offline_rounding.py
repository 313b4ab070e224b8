"""Codes fit their bits, and GPTQ does better than rounding exactly where inputs are correlated."""

import pytest
import torch

from infoquant_vllm.format import WeightArgs
from offline.gptq import gptq, inverse_factor, output_error
from offline.weights import round_to_nearest, search_scales

SCHEMES = [
    pytest.param(WeightArgs(num_bits=bits, symmetric=symmetric, **group), id=f"{bits}-{symmetric}-{group}")
    for bits in (4, 8)
    for symmetric in (True, False)
    for group in ({}, {"strategy": "group", "group_size": 24})
]
DAMPING = 0.01


def random_weight(rows: int = 70, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def correlated_hessian(columns: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x.T @ x


@pytest.mark.parametrize("args", SCHEMES)
@pytest.mark.parametrize("extreme", [0.0, 1e-30, 1.0, 1e6])
def test_codes_fit_their_bits(args: WeightArgs, extreme: float) -> None:
    weight = random_weight() * extreme
    weight[0], weight[1, 1:] = 1.0, -1.0
    lowest, highest = (
        (-(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1) if args.symmetric else (0, 2**args.num_bits - 1)
    )
    for rounded in (round_to_nearest(weight, args), gptq(weight, correlated_hessian(), args, DAMPING)):
        assert lowest <= rounded.codes.min()
        assert rounded.codes.max() <= highest
        assert torch.equal(rounded.codes, rounded.codes.round())
        assert (rounded.scale > 0).all()
        assert torch.isfinite(rounded.values()).all()


@pytest.mark.parametrize("args", SCHEMES)
def test_gptq_loses_less_than_rounding_on_correlated_inputs(args: WeightArgs) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    plain, better = round_to_nearest(weight, args), gptq(weight, hessian, args, DAMPING)
    assert output_error(weight, better.values(), hessian) < 0.8 * output_error(weight, plain.values(), hessian)


@pytest.mark.parametrize("args", SCHEMES)
def test_gptq_on_uncorrelated_inputs_is_rounding(args: WeightArgs) -> None:
    weight = random_weight()
    plain, same = round_to_nearest(weight, args), gptq(weight, torch.eye(96), args, DAMPING)
    for field in ("codes", "scale", "zero"):
        assert torch.equal(getattr(plain, field), getattr(same, field)), field


@pytest.mark.parametrize("rank", [0, 10, 96])
def test_inverse_factor_is_that_of_the_damped_hessian_of_any_rank(rank: int) -> None:
    x = torch.randn(rank, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x
    factor = inverse_factor(hessian, DAMPING)
    damped = hessian + torch.eye(96) * (DAMPING * hessian.diagonal().mean() if rank else 1.0)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(96, dtype=torch.float64))


def test_clip_search_narrows_the_range_where_one_weight_sticks_out() -> None:
    args, weight = WeightArgs(num_bits=4), random_weight(70, 1000)
    weight[0] = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    weight[0, 5] = 6.0
    scales = search_scales(weight, args)
    assert scales.scale[0] < 0.9 * weight[0].abs().max() / 7
    unclipped = scales.scale.clone()
    unclipped[:] = weight.abs().amax(1, keepdim=True) / 7
    searched = (scales.values(scales.codes(weight)) - weight).square().sum(1)
    plain = ((weight / unclipped).round() * unclipped - weight).square().sum(1)
    assert (searched <= plain).all()
