"""Layers of one checkpoint may have other number formats than the rest."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from infoquant_vllm.format import Checkpoint, FormatError, ModelShape, WeightArgs
from offline import PRESETS, Recipe, ToolError, load_recipe, quantize
from offline.evaluate.inspect import inspect_checkpoint
from offline.evaluate.verify import verify
from offline.formats import LayerSites, Site, SiteActivations
from offline.model.source import Source
from offline.output.report import Report
from offline.progress import silent
from tests.common.tiny import MIXTURES, SIZES, write_source
from tests.offline.test_pipeline import TEXT, digests, small

WEIGHTS = WeightArgs(num_bits=4, symmetric=False, strategy="group", group_size=32)
EIGHT = Site(weights=WeightArgs(num_bits=8), input_activations=SiteActivations(num_bits=8), clip_ratio="search")
FINE = Site(weights=WEIGHTS, input_activations=SiteActivations(strategy="group", group_size=32), clip_ratio="search")
PLAIN = Site(weights=WEIGHTS, input_activations=SiteActivations(num_bits=16))
MIXED = [LayerSites(layers=[1], sites={"qkv": FINE, "down": EIGHT}), LayerSites(layers=[0], sites={"gate_up": PLAIN})]


def mixed(preset: str) -> Recipe:
    return small(preset).model_copy(update={"layers": MIXED})


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.mark.parametrize(
    ("preset", "size"),
    [("fast", "tied"), ("balanced", "qwen3"), ("paper", "tied"), ("fast", "phi3"), *(("fast", m) for m in MIXTURES)],
)
def test_named_layers_have_their_own_formats(tmp_path: Path, text: str, preset: str, size: str) -> None:
    recipe, source = mixed(preset), write_source(tmp_path / "source", **SIZES[size])
    report = quantize(source, tmp_path / "out", recipe=recipe, calibration=text, progress=silent)
    checkpoint = Checkpoint(tmp_path / "out")
    for site, linears in checkpoint.shape.sites.items():
        for layer in (0, 1):
            for linear in linears:
                scheme = checkpoint.config.scheme(f"model.layers.{layer}.{linear}")
                assert scheme is not None
                assert scheme.weights == recipe.site(site, layer).weights
                assert scheme.input_activations == recipe.input_activations(site, checkpoint.shape, layer)
    assert recipe.site("down", 1) == EIGHT != recipe.site("down", 0) == recipe.sites.down
    assert load_recipe(tmp_path / "out/infoquant_recipe.yaml") == recipe
    assert verify(tmp_path / "out", against=str(source)).passed
    found = inspect_checkpoint(tmp_path / "out")
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight)
    assert any(name.startswith("model.layers.1.") for name in found.schemes)


@pytest.mark.parametrize("preset", ["rtn", "best", "fast"])
def test_layers_that_say_what_sites_say_change_no_byte(tmp_path: Path, text: str, preset: str) -> None:
    source, recipe = write_source(tmp_path / "source"), small(preset)
    sites = {"qkv": recipe.sites.qkv, "o": recipe.sites.o, "gate_up": recipe.sites.gate_up, "down": recipe.sites.down}
    said = recipe.model_copy(update={"layers": [LayerSites(layers=[0, 1], sites=sites)]})
    for name, used in (("plain", recipe), ("said", said)):
        quantize(source, tmp_path / name / "model", recipe=used, calibration=text, progress=silent)
    plain, other = (digests(tmp_path / name / "model") for name in ("plain", "said"))
    for names in ("config.json", "infoquant_recipe.yaml"):  # which do say how they were asked
        assert plain.pop(names) != other.pop(names)
    assert plain == other


def test_a_dry_run_knows_the_sizes_of_layers_that_differ(tmp_path: Path, text: str) -> None:
    source, recipe = write_source(tmp_path / "source"), mixed("fast")
    planned = quantize(source, tmp_path / "out", recipe=recipe, calibration=text, dry_run=True, progress=silent)
    written = quantize(source, tmp_path / "out", recipe=recipe, calibration=text, progress=silent)
    assert sizes(planned) == sizes(written)
    assert planned.plan is not None
    shape = Source.open(source).shape
    rows, columns = shape.layer_linears["mlp.down_proj"]
    assert planned.plan.sites["down"].bytes > rows * columns  # of the layer in 8 bits


def sizes(report: Report) -> dict[str, Any]:
    return {name: value for name, value in report.model_dump().items() if name.endswith(("bytes", "weight"))} | {
        "peak_memory_bytes": None
    }


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"layers": [0, 0], "sites": {"o": {}}}], "names site 'o' of layer 0 more than once"),
        ([{"layers": [1], "sites": {"o": {}}}, {"layers": [0, 1], "sites": {"o": {}}}], "'o' of layer 1 more than"),
        ([{"layers": [], "sites": {"o": {}}}], r"layers\.0\.layers"),
        ([{"layers": [-1], "sites": {"o": {}}}], r"layers\.0\.layers\.0"),
        ([{"layers": ["1"], "sites": {"o": {}}}], r"layers\.0\.layers\.0"),
        ([{"layers": [True], "sites": {"o": {}}}], r"layers\.0\.layers\.0"),
        ([{"layers": [1], "sites": {}}], r"layers\.0\.sites"),
        ([{"layers": [1], "sites": {"q_proj": {}}}], r"layers\.0\.sites\.q_proj"),
        ([{"layers": [1], "sites": {"o": {"bits": 8}}}], r"layers\.0\.sites\.o\.bits"),
        ({"1": {}}, "layers"),
    ],
)
def test_impossible_layers_are_refused_naming_file_and_field(tmp_path: Path, layers: object, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "x", "transform": "none", "rounding": "gptq", "layers": layers}))
    with pytest.raises(ToolError, match=message) as error:
        load_recipe(file)
    assert "recipe.yaml" in str(error.value)


def test_layers_need_what_their_formats_need() -> None:
    data = PRESETS["rtn"].model_dump() | {"layers": [{"layers": [0], "sites": {"down": EIGHT.model_dump()}}]}
    with pytest.raises(ValueError, match=r"layers\[0\]\.sites\.down\.clip_ratio 'search' reads the statistics of GPTQ"):
        Recipe.model_validate(data)
    with pytest.raises(ValueError, match="does not go with rounding 'none'"):
        Recipe.model_validate(PRESETS["kv4"].model_dump() | {"layers": [{"layers": [0], "sites": {"o": {}}}]})


def test_a_layer_that_the_model_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    recipe = small("fast").model_copy(update={"layers": [LayerSites(layers=[1, 2], sites={"o": FINE})]})
    with pytest.raises(ToolError, match="layers names layer 2, the model has 2, from 0 on"):
        quantize(source, tmp_path / "out", recipe=recipe, progress=silent)


@pytest.mark.parametrize("part", ["weights", "inputs"])
def test_groups_of_a_layer_that_no_rank_can_hold_are_refused_by_name(tmp_path: Path, part: str) -> None:
    shape: ModelShape = Source.open(write_source(tmp_path / "source", intermediate_size=352)).shape
    inputs = {"input_activations": SiteActivations(strategy="group", group_size=32)}
    site = Site(**{"weights": {"weights": WEIGHTS}, "inputs": inputs}[part])
    recipe = small("rtn").model_copy(update={"layers": [LayerSites(layers=[1], sites={"down": site})]})
    recipe.quantization_config(shape)
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.down_proj with max_tp_size 2.*32 does not divide"):
        recipe.model_copy(update={"max_tp_size": 2}).quantization_config(shape)
