"""Codes fit their bits, and GPTQ does better than rounding exactly where inputs are correlated."""

import dataclasses

import pytest
import torch

from infoquant_vllm.format import WeightArgs
from offline.algorithms.gptq import gptq, output_error, unit_factor
from offline.algorithms.refine import descend, refine, refit_scales
from offline.algorithms.rtn import largest_multiplier, round_to_nearest, search_scales, search_steps

SCHEMES = [
    pytest.param(WeightArgs(num_bits=bits, symmetric=symmetric, **group), id=f"{bits}-{symmetric}-{group}")
    for bits, group in ((4, {}), (8, {}), (4, {"strategy": "group", "group_size": 24}))
    for symmetric in (True, False)
]
DAMPENING = 0.01


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
    by_gptq, hessian = gptq(weight, correlated_hessian(), args, DAMPENING), correlated_hessian()
    for rounded in (round_to_nearest(weight, args), by_gptq, refine(weight, by_gptq, hessian, args, 2)):
        assert lowest <= rounded.codes.min()
        assert rounded.codes.max() <= highest
        assert torch.equal(rounded.codes, rounded.codes.round())
        assert (rounded.scale > 0).all()
        assert torch.isfinite(rounded.values()).all()
        assert torch.equal(rounded.multiplier, rounded.multiplier.round())
        assert (rounded.multiplier >= 1).all()
        if args.group_size is None:
            assert (rounded.multiplier == 1).all()
        else:
            farthest = torch.maximum(rounded.zero - lowest, highest - rounded.zero)
            assert (rounded.multiplier * farthest <= 127).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_multipliers_of_a_scale_per_row_cost_little(symmetric: bool) -> None:
    args = WeightArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=24)
    weight = random_weight() * torch.tensor([1.0, 0.3, 2.0, 0.7]).repeat_interleave(24)
    lost = (round_to_nearest(weight, args).values() - weight).square().sum()
    alone = WeightArgs(num_bits=4, symmetric=symmetric)
    exact = sum((round_to_nearest(part, alone).values() - part).square().sum() for part in weight.split(24, dim=1))
    assert lost < 1.04 * exact


@pytest.mark.parametrize("args", SCHEMES)
def test_gptq_loses_less_than_rounding_on_correlated_inputs(args: WeightArgs) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    plain, better = round_to_nearest(weight, args), gptq(weight, hessian, args, DAMPENING)
    assert output_error(weight, better, hessian) < 0.8 * output_error(weight, plain, hessian)


@pytest.mark.parametrize("args", SCHEMES)
def test_gptq_on_uncorrelated_inputs_is_rounding(args: WeightArgs) -> None:
    weight = random_weight()
    plain, same = round_to_nearest(weight, args), gptq(weight, torch.eye(96), args, DAMPENING)
    for field in ("codes", "scale", "multiplier", "zero"):
        assert torch.equal(getattr(plain, field), getattr(same, field)), field


@pytest.mark.parametrize("args", SCHEMES)
def test_each_step_of_refining_lowers_the_error_of_outputs(args: WeightArgs) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    start = gptq(weight, hessian, args, DAMPENING)
    moved = descend(weight, start, hessian, args)
    scaled = refit_scales(weight, moved, hessian, args)
    errors = [output_error(weight, rounded, hessian) for rounded in (start, moved, scaled)]
    assert errors[0] > errors[1] > errors[2]
    assert output_error(weight, refine(weight, start, hessian, args, 3), hessian) < 0.97 * errors[0]


def test_no_single_code_is_better_than_the_one_that_coordinate_descent_finds() -> None:
    args, weight, hessian = WeightArgs(num_bits=4), random_weight(6, 24), correlated_hessian(24)
    rounded = gptq(weight, hessian, args, DAMPENING)
    for _ in range(20):
        rounded = descend(weight, rounded, hessian, args)
    least = output_error(weight, rounded, hessian)
    for row, column in torch.cartesian_prod(torch.arange(6), torch.arange(24)).tolist():
        for step in (-1, 1):
            if -8 <= rounded.codes[row, column] + step <= 7:
                codes = rounded.codes.clone()
                codes[row, column] += step
                moved = dataclasses.replace(rounded, codes=codes)
                assert output_error(weight, moved, hessian) >= least * (1 - 1e-5)


@pytest.mark.parametrize("args", SCHEMES)
def test_refitted_scales_are_those_of_least_squares(args: WeightArgs) -> None:
    weight, x = random_weight().double(), torch.randn(300, 96, dtype=torch.float64)
    found = refit_scales(weight, round_to_nearest(weight, args), x.T @ x, args)
    for row in (0, 69):
        column = x @ (found.values()[row] / found.scale[row])
        expected = torch.linalg.lstsq(column[:, None], (x @ weight[row])[:, None]).solution[0]
        torch.testing.assert_close(found.scale[row], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_single_multiplier_is_better_than_the_one_that_refitting_finds(symmetric: bool) -> None:
    args = WeightArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=24)
    weight, hessian = random_weight(6), correlated_hessian()
    rounded = gptq(weight, hessian, args, DAMPENING)
    for _ in range(10):
        rounded = refit_scales(weight, rounded, hessian, args)
    least, largest = output_error(weight, rounded, hessian), largest_multiplier(rounded.zero, args)
    for row, group in torch.cartesian_prod(torch.arange(6), torch.arange(4)).tolist():
        for step in (-1, 1):
            if 1 <= rounded.multiplier[row, group] + step <= largest[row, group]:
                multiplier = rounded.multiplier.clone()
                multiplier[row, group] += step
                moved = dataclasses.replace(rounded, multiplier=multiplier)
                assert output_error(weight, moved, hessian) >= least * (1 - 1e-5)


@pytest.mark.parametrize("args", SCHEMES)
def test_refining_leaves_weights_alone_that_nothing_is_known_of(args: WeightArgs) -> None:
    weight = random_weight()
    rounded = gptq(weight, torch.zeros(96, 96), args, DAMPENING)
    assert refine(weight, rounded, torch.zeros(96, 96), args, 2) is rounded
    few = torch.zeros(96, 96)
    few[3, 3] = 1.0  # only one input was ever seen
    refined = refine(weight, rounded, few, args, 2)
    assert torch.isfinite(refined.values()).all()
    assert (refined.scale > 0).all()


@pytest.mark.parametrize("block", [40, 2048])
@pytest.mark.parametrize("rank", [0, 10, 96])
def test_factor_is_that_of_the_dampened_hessian_of_any_rank(
    rank: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline.algorithms.gptq.FACTOR_BLOCK", block)
    x = torch.randn(rank, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x
    dampened = hessian + torch.eye(96) * (DAMPENING * hessian.diagonal().mean() if rank else 1.0)
    blocks = unit_factor(hessian, DAMPENING)
    factor = torch.cat([torch.nn.functional.pad(part, (0, 0, 0, 96 - len(part))) for part in blocks], dim=1).double()
    assert [part.shape for part in blocks] == [
        (min(start + block, 96), min(block, 96 - start)) for start in range(0, 96, block)
    ]
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() == 1).all()
    inverse = torch.linalg.inv(factor)
    scale = (inverse @ dampened @ inverse.T).diagonal()
    torch.testing.assert_close(
        factor @ (scale[:, None] * factor.T), dampened, rtol=1e-5, atol=1e-5 * dampened.max().item()
    )


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_weights_are_rounded_for_inputs_that_are_all_equal_to_their_mean(scale: float) -> None:
    """The Hessian holds rounding errors alone then, and has negative eigenvalues."""
    x = scale * torch.randn(1, 96, generator=torch.Generator().manual_seed(0)).repeat(1000, 1)
    hessian = (x.T @ x).addr_(x.sum(0), x.mean(0), alpha=-1)
    assert torch.linalg.eigvalsh(hessian.double()).min() < -DAMPENING * hessian.diagonal().double().mean()
    weight, args = random_weight(), WeightArgs(num_bits=4)
    values = gptq(weight, hessian, args, DAMPENING).values()
    assert (values - weight).norm() < 0.2 * weight.norm()


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, args: WeightArgs) -> torch.Tensor:
    """The values that GPTQ's algorithm 1 rounds to in float64, column by column, by the inverse's factor."""
    rest, values = weight.double(), torch.empty_like(weight, dtype=torch.float64)
    scale = search_scales(rest, args)
    dampened = hessian.double() + DAMPENING * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(dampened), upper=True)
    for column in range(weight.shape[1]):
        if column % (args.group_size or weight.shape[1]) == 0:
            steps = search_steps(rest[:, column : column + (args.group_size or weight.shape[1])], scale, args)
        values[:, column] = steps.values(steps.codes(rest[:, column : column + 1]))[:, 0]
        error = (rest[:, column] - values[:, column]) / factor[column, column]
        rest[:, column:] -= torch.outer(error, factor[column, column:])
    return values


@pytest.mark.parametrize("block", [40, 2048])
@pytest.mark.parametrize("args", SCHEMES)
def test_gptq_by_parts_rounds_as_the_plain_algorithm(
    args: WeightArgs, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline.algorithms.gptq.FACTOR_BLOCK", block)
    weight, hessian = random_weight(), correlated_hessian()
    found, expected = gptq(weight, hessian, args, DAMPENING).values(), plain_gptq(weight, hessian, args)
    same = torch.isclose(found, expected.float(), rtol=1e-4, atol=1e-5).all(1)
    assert same.float().mean() > 0.95  # a row in which two codes are as good as each other may go another way


def test_clip_search_narrows_the_range_where_one_weight_sticks_out() -> None:
    args, weight = WeightArgs(num_bits=4), random_weight(70, 1000)
    weight[0] = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    weight[0, 5] = 6.0
    rounded = round_to_nearest(weight, args)
    assert rounded.scale[0] < 0.9 * weight[0].abs().max() / 7
    unclipped = weight.abs().amax(1, keepdim=True) / 7
    searched = (rounded.values() - weight).square().sum(1)
    plain = ((weight / unclipped).round() * unclipped - weight).square().sum(1)
    assert (searched <= plain).all()
