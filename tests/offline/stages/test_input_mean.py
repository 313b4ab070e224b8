"""Inputs less their mean: the statistics that are read, the tensors that are written, and what they compute."""

from pathlib import Path

import pytest
import torch

from infoquant_vllm.format import SITE_NORMS, SITES
from offline.algorithms.fake_quantize import added_to_product
from offline.algorithms.rotations import transform_input
from offline.formats import Site, SiteActivations, Sites
from offline.model.input_statistics import InputStatistics
from offline.model.source import Source
from offline.output.store import Store
from offline.progress import silent
from offline.recipe import Gptq, KVCache, Psot, Recipe
from offline.run import Run
from offline.stages.quantize_layer import LayerInputs, quantize_layer
from offline.stages.rotate_shared import collect_inputs
from tests.common.tiny import SIZES, VOCAB_SIZE, write_source

CENTERED = Site(input_activations=SiteActivations(mean=True))
NAMES = dict.fromkeys(SITES, CENTERED)


def recipe(**changes: object) -> Recipe:
    given = {"name": "x", "transform": "psot-shared", "rounding": "gptq", "sites": Sites(**NAMES)}
    return Recipe.model_validate(given | changes)


def test_statistics_less_the_mean_are_those_of_inputs_less_the_mean() -> None:
    x = torch.randn(160, 24, generator=torch.Generator().manual_seed(0)) + 3 * torch.arange(24) / 24
    scale, (given, centered) = 1 + torch.arange(24) / 8, (InputStatistics(), InputStatistics())
    given.observe("a", x)
    given.scale("a", scale)
    hessian = given.take_hessians()["a"] * torch.outer(scale, scale)
    mean = given.subtract_mean("a", hessian)
    torch.testing.assert_close(mean, (x * scale).mean(0))
    centered.observe("a", x * scale - (x * scale).mean(0))
    torch.testing.assert_close(hessian, centered.take_hessians()["a"], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(given.samples()["a"], centered.samples()["a"])


@pytest.mark.parametrize("size", ["tied", "biases", "qwen2"])
def test_a_linear_gives_the_mean_input_the_sources_output(tmp_path: Path, size: str) -> None:
    """And all of its linears share the mean behind the transform of their input."""
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    used, generator = recipe(), torch.Generator().manual_seed(0)
    state = {
        name.removeprefix("model.layers.0."): source.tensor(name).float()
        for name in source.names
        if name.startswith("model.layers.0.")
    }
    before = dict(state)
    features = {site: state[f"{linears[0]}.weight"].shape[1] for site, linears in SITES.items()}
    means = {SITES[site][0]: torch.randn(count, generator=generator) for site, count in features.items()}
    tensors, _ = quantize_layer(LayerInputs(0, state, means=dict(means)), used, source.shape, torch.float32)
    for site, linears in SITES.items():
        for linear in linears:
            weight, mean = before[f"{linear}.weight"], means[linears[0]]
            torch.testing.assert_close(tensors[f"{linear}.output_mean"], weight @ mean)
            transform = used.input_transform(site, source.shape)
            rotated = transform_input(mean[None], transform, {})[0]
            torch.testing.assert_close(tensors[f"{linear}.input_mean"], rotated)
            local = {kind: tensors.get(f"{linear}.{kind}") for kind in ("output_mean", "bias")}
            expected = torch.nn.functional.linear(mean, weight, before.get(f"{linear}.bias"))
            torch.testing.assert_close(added_to_product({k: t for k, t in local.items() if t is not None}), expected)


@pytest.mark.parametrize("sites", [{"qkv"}, {"gate_up"}, {"qkv", "gate_up"}, set()])
def test_the_rotation_is_learned_on_inputs_less_the_mean_of_each_layer_where_they_are_quantized_so(
    tmp_path: Path, sites: set[str]
) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES["tied"]))
    used = recipe(sites=Sites(**dict.fromkeys(sites, CENTERED)), psot=Psot(pool_tokens=64))
    config = used.quantization_config(source.shape)
    run = Run(source, used, config, 0, [torch.device("cpu")], silent, Store(tmp_path / "store"))
    tokens = torch.randint(3, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(2))
    pool = collect_inputs(run, tokens)  # one batch: the rows of a layer's sites lie one after the other
    by_site = pool.view(source.shape.num_hidden_layers, len(SITE_NORMS), -1, source.shape.hidden_size)
    for index, site in enumerate(SITE_NORMS):
        largest = by_site[:, index].mean(1).abs().max()
        assert largest < 1e-6 if site in sites else largest > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounding": "rtn"}, "sites.qkv.input_activations.mean reads the statistics of GPTQ"),
        ({"sites": {"o": {"input_activations": {"num_bits": 16, "mean": True}}}}, "mean does not go with num_bits 16"),
    ],
)
def test_a_recipe_that_cannot_take_means_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(kv_cache=KVCache(), gptq=Gptq(), **changes)
