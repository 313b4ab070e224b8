"""First tokens: their statistics are apart, and weights make up for the rounding of their inputs."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from infoquant_vllm.format import SITES, unpack_codes
from offline.algorithms.fake_quantize import fake_quantize
from offline.algorithms.rotations import transform_input
from offline.algorithms.sinks import DAMPENING_FRAC, Sinks
from offline.formats import Site, Sites
from offline.model.input_statistics import InputStatistics, WeightedRows
from offline.model.source import Source
from offline.recipe import Gptq, LearnedClips, Recipe
from offline.stages.quantize_layer import LayerInputs, quantize_layer
from tests.common.tiny import SIZES, write_source

LENGTH, SEQUENCES = 16, 24
EIGHT_BITS = {"weights": {"num_bits": 8}, "clip_ratio": 0.8}


def recipe(sink_weight: float) -> Recipe:
    """Clips so tight that they show, and weights so fine that they do not."""
    site = Site.model_validate(EIGHT_BITS)
    sites = Sites(qkv=site, o=site, gate_up=site, down=site)
    return Recipe(
        name="x", transform="hadamard", rounding="gptq", sites=sites, gptq=Gptq(sink_weight=sink_weight, refinements=1)
    )


def test_correction_is_the_least_sum_of_both_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    exact, weight = torch.randn(5, 32, generator=generator), torch.randn(7, 32, generator=generator)
    rounded, inputs = exact.round(), torch.randn(400, 32, generator=generator)
    hessian, sinks = inputs.T @ inputs, Sinks(exact, rounded, torch.tensor([3.0, 3, 1, 3, 0.5]))
    diagonal = hessian.diagonal() * 1.0
    diagonal += DAMPENING_FRAC * diagonal.mean()

    def loss(change: torch.Tensor) -> torch.Tensor:
        lost = (weight + change) @ rounded.T - weight @ exact.T
        return (sinks.weights * lost.square()).sum() + (change.square() * diagonal).sum()

    found = sinks.correction(weight, hessian).requires_grad_()
    loss(found).backward()
    assert found.grad is not None
    assert found.grad.abs().max() < 1e-3 * loss(torch.zeros_like(weight))
    assert loss(found) < 0.9 * loss(torch.zeros_like(weight))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e12])
def test_correction_is_finite_for_degenerate_inputs(value: float) -> None:
    rows = torch.full((3, 8), value)
    sinks = Sinks(rows, 0.9 * rows, torch.full((3,), 16.0))
    for hessian in (torch.zeros(8, 8), torch.eye(8), 1e20 * torch.eye(8)):
        assert sinks.correction(torch.ones(4, 8), hessian).isfinite().all()
        assert sinks.added_to(hessian.clone()).isfinite().all()


@pytest.mark.parametrize("batches", [[96], [32, 64], [48, 16, 32]])
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_leave_first_tokens_out_and_keep_them(batches: list[int], weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(96, 12, generator=generator), torch.rand(96, generator=generator)
    scale, first = 1 + torch.arange(12) / 8, torch.arange(96) % LENGTH == 0
    given = InputStatistics({"a": weights} if weighted else {}, sink_stride=LENGTH)
    for part in x.split(batches):
        given.observe("a", part)
    other = InputStatistics({"a": weights[~first]} if weighted else {})
    other.observe("a", x[~first])
    for statistics in (given, other):
        statistics.scale("a", scale)
    hessians = [statistics.take_hessians()["a"] * torch.outer(scale, scale) for statistics in (given, other)]
    means = [one.subtract_mean("a", hessian) for one, hessian in zip((given, other), hessians, strict=True)]
    torch.testing.assert_close(means[0], means[1])
    torch.testing.assert_close(hessians[0], hessians[1], rtol=1e-4, atol=1e-3)
    rows, own = given.sinks()["a"]
    torch.testing.assert_close(rows, x[first] * scale - means[0])
    assert torch.equal(own, weights[first] if weighted else torch.ones(6))
    assert other.sinks() == {}


@pytest.mark.parametrize("sink_weight", [0.0, 16.0])
def test_outputs_of_first_tokens_are_the_sources_although_inputs_are_clipped(
    tmp_path: Path, sink_weight: float
) -> None:
    """With weights of 8 bits what is lost is the clipping's; weights that do not know of it lose ten times as much."""
    source, generator = Source.open(write_source(tmp_path / "source", **SIZES["tied"])), torch.Generator()
    prefix, used, shape = "model.layers.0.", recipe(sink_weight), source.shape
    state = {name.removeprefix(prefix): source.tensor(name).float() for name in source.names if name.startswith(prefix)}
    inputs = LayerInputs(0, dict(state), hessians={})
    rows: dict[str, torch.Tensor] = {}
    for linears in SITES.values():
        features = state[f"{linears[0]}.weight"].shape[1]
        sink = torch.zeros(features)
        sink[generator.manual_seed(features).initial_seed() % features] = 1000.0
        rows[linears[0]] = sink + torch.randn(SEQUENCES, features, generator=generator)
        others = torch.randn(SEQUENCES * LENGTH, features, generator=generator)
        assert inputs.hessians is not None
        inputs.hessians[linears[0]] = others.T @ others
        if sink_weight:
            inputs.sinks[linears[0]] = WeightedRows(rows[linears[0]], torch.ones(SEQUENCES))
    tensors, _ = quantize_layer(inputs, used, shape, torch.float32)
    for site, linears in SITES.items():
        args = used.input_activations(site, shape, 0)
        y = transform_input(rows[linears[0]], used.input_transform(site, shape), {}).contiguous()
        rounded = fake_quantize(y, tensors[f"{linears[0]}.input_clip_ratio"], args)
        for linear in linears:
            codes = unpack_codes(tensors[f"{linear}.weight_packed"], 8, signed=True)
            weight = codes.float() * tensors[f"{linear}.weight_scale"]
            expected = rows[linears[0]] @ state[f"{linear}.weight"].T
            lost = (rounded @ weight.T - expected).norm() / expected.norm()
            if sink_weight:
                assert lost < 0.03, (linear, lost)
            else:
                assert lost > 0.1, (linear, lost)


def test_recipes_refuse_sinks_where_nothing_knows_of_them() -> None:
    with pytest.raises(ValidationError, match=r"gptq.sink_weight reads the statistics of GPTQ"):
        Recipe(name="x", transform="hadamard", rounding="rtn", gptq=Gptq(sink_weight=16))
    with pytest.raises(ValidationError, match=r"learned_clips change afterwards; leave out gptq.sink_weight"):
        Recipe(
            name="x",
            transform="psot-layer",
            rounding="gptq",
            gptq=Gptq(sink_weight=16),
            learned_clips=LearnedClips(),
        )
