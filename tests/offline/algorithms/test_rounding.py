"""Codes fit their bits, and GPTQ does better than rounding exactly where inputs are correlated."""

import pytest
import torch

from infoquant_vllm.format import WeightArgs
from offline.algorithms.gptq import gptq, output_error, unit_factor
from offline.algorithms.refine import descend, refine, refit_scales
from offline.algorithms.rtn import QuantizedWeight, round_to_nearest, search_scales

SCHEMES = [
    pytest.param(WeightArgs(num_bits=bits, symmetric=symmetric, **group), id=f"{bits}-{symmetric}-{group}")
    for bits in (4, 8)
    for symmetric in (True, False)
    for group in ({}, {"strategy": "group", "group_size": 24})
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


@pytest.mark.parametrize("args", SCHEMES)
def test_gptq_loses_less_than_rounding_on_correlated_inputs(args: WeightArgs) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    plain, better = round_to_nearest(weight, args), gptq(weight, hessian, args, DAMPENING)
    assert output_error(weight, better, hessian) < 0.8 * output_error(weight, plain, hessian)


@pytest.mark.parametrize("args", SCHEMES)
def test_gptq_on_uncorrelated_inputs_is_rounding(args: WeightArgs) -> None:
    weight = random_weight()
    plain, same = round_to_nearest(weight, args), gptq(weight, torch.eye(96), args, DAMPENING)
    for field in ("codes", "scale", "zero"):
        assert torch.equal(getattr(plain, field), getattr(same, field)), field


@pytest.mark.parametrize("args", SCHEMES)
def test_each_step_of_refining_lowers_the_error_of_outputs(args: WeightArgs) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    start = gptq(weight, hessian, args, DAMPENING)
    moved = descend(weight, start, hessian, args)
    scaled = refit_scales(weight, moved, hessian)
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
                moved = QuantizedWeight(codes, rounded.scale, rounded.zero)
                assert output_error(weight, moved, hessian) >= least * (1 - 1e-5)


@pytest.mark.parametrize("args", SCHEMES)
def test_refitted_scales_are_those_of_least_squares(args: WeightArgs) -> None:
    weight, x = random_weight().double(), torch.randn(300, 96, dtype=torch.float64)
    rounded = round_to_nearest(weight, args)
    found = refit_scales(weight, rounded, x.T @ x)
    groups = rounded.scale.shape[1]
    for row in (0, 69):
        codes = rounded.codes[row].unflatten(0, (groups, -1)) - rounded.zero[row, :, None]
        columns = torch.stack([x.unflatten(1, (groups, -1))[:, g] @ codes[g] for g in range(groups)], dim=1)
        expected = torch.linalg.lstsq(columns, (x @ weight[row])[:, None]).solution[:, 0]
        torch.testing.assert_close(found.scale[row], expected, rtol=1e-4, atol=0)


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


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, args: WeightArgs) -> torch.Tensor:
    """The values that GPTQ's algorithm 1 rounds to in float64, column by column, by the inverse's factor."""
    rest, values = weight.double(), torch.empty_like(weight, dtype=torch.float64)
    dampened = hessian.double() + DAMPENING * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    factor = torch.linalg.cholesky(torch.linalg.inv(dampened), upper=True)
    for column in range(weight.shape[1]):
        if column % (args.group_size or weight.shape[1]) == 0:
            scales = search_scales(rest[:, column : column + (args.group_size or weight.shape[1])], args)
        values[:, column] = scales.values(scales.codes(rest[:, column : column + 1]))[:, 0]
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
    scales = search_scales(weight, args)
    assert scales.scale[0] < 0.9 * weight[0].abs().max() / 7
    unclipped = scales.scale.clone()
    unclipped[:] = weight.abs().amax(1, keepdim=True) / 7
    searched = (scales.values(scales.codes(weight)) - weight).square().sum(1)
    plain = ((weight / unclipped).round() * unclipped - weight).square().sum(1)
    assert (searched <= plain).all()
