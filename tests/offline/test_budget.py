"""A budget chooses formats by layer: within its limits, for the sites that cost most, and again from its recipe."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infoquant_vllm.format import BASIS_WEIGHTS, Checkpoint
from offline import PRESETS, Recipe, Report, ToolError, load_recipe, quantize
from offline.evaluate.inspect import part_sizes
from offline.goal import RESERVE, Budget, read_budget
from offline.progress import silent
from tests.common.tiny import SIZES, write_source
from tests.offline.test_pipeline import TEXT, digests, small

LAYERS = 3
FINENESS = ["4 bits", *(f"4 bits, groups of {size}" for size in (128, 64, 32)), "8 bits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source whose last layer adds ten times as much to the residual stream as others do, and a text."""
    folder = tmp_path_factory.mktemp("budget")
    write_source(folder / "source", num_hidden_layers=LAYERS)
    file = folder / "source/model.safetensors"
    tensors = load_file(file)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.{LAYERS - 1}.{name}.weight"] *= 10
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "text.txt").write_text(TEXT)
    return folder


def made(folder: Path, name: str, budget: Budget | None, recipe: Recipe, **options: Any) -> Report:
    text = str(folder / "text.txt")
    options = {"progress": silent} | options
    return quantize(folder / "source", folder / name, recipe=recipe, calibration=text, budget=budget, **options)


@pytest.fixture(scope="module")
def chosen(folder: Path) -> Report:
    return made(folder, "chosen", Budget(target_bits=4.6), small("fast"))


def test_the_checkpoint_keeps_the_budget_to_the_byte(folder: Path, chosen: Report) -> None:
    checkpoint = Checkpoint(folder / "chosen")
    weights = sum(rows * columns for rows, columns in checkpoint.shape.linears().values())
    stored = 8 * part_sizes(checkpoint)["linears"].bytes / weights
    assert chosen.budget is not None
    assert 4.5 < stored <= 4.6
    assert stored == pytest.approx(chosen.bits_per_weight) == pytest.approx(chosen.budget.bits_per_weight)


def test_a_fragile_layer_has_more_bits(tmp_path: Path, folder: Path, chosen: Report) -> None:
    write_source(tmp_path / "source", num_hidden_layers=LAYERS)
    (tmp_path / "text.txt").write_text(TEXT)
    plain = made(tmp_path, "plain", Budget(target_bits=4.6), small("fast"))
    assert plain.budget is not None
    assert chosen.budget is not None
    for site in ("qkv", "o"):
        robust, fragile = (FINENESS.index(found.sites[site][-1].weights) for found in (plain.budget, chosen.budget))
        assert fragile > robust


def test_the_choice_costs_less_than_any_uniform_one_of_no_fewer_bits(chosen: Report) -> None:
    budget = chosen.budget
    assert budget is not None
    assert budget.kl < budget.base_kl
    uniform = [kl for bits, kl in budget.uniform.values() if bits <= budget.bits_per_weight]
    assert uniform
    assert budget.kl < min(uniform)
    bits, kls = zip(*budget.curve, strict=True)
    assert list(bits) == sorted(bits)
    assert list(kls) == sorted(kls, reverse=True)


def test_inputs_have_no_more_bits_than_the_bases(folder: Path) -> None:
    recipe = small("balanced")
    report = made(folder, "balanced", Budget(target_bits=4.5), recipe)
    shape = Checkpoint(folder / "balanced").shape

    def bits(recipe: Recipe) -> int:
        return sum(
            rows * columns * recipe.site(site, layer).input_activations.num_bits
            for site, linears in shape.sites.items()
            for layer in range(LAYERS)
            for rows, columns in (shape.layer_linears[linear] for linear in linears)
        )

    used = load_recipe(folder / "balanced/infoquant_recipe.yaml")
    assert bits(used) <= bits(recipe)
    assert report.budget is not None
    assert {layer.inputs for layers in report.budget.sites.values() for layer in layers} == {
        "4 bits, groups of 32",
        "8 bits",
    }


def test_its_recipe_makes_the_same_checkpoint_again(folder: Path, chosen: Report) -> None:
    again = made(folder, "again/chosen", None, load_recipe(folder / "chosen/infoquant_recipe.yaml"))
    assert again.budget is None
    assert digests(folder / "again/chosen") == digests(folder / "chosen")


def test_a_limit_of_kl_takes_the_fewest_bytes(folder: Path, chosen: Report) -> None:
    assert chosen.budget is not None
    most = 1.05 * chosen.budget.kl
    report = made(folder, "kl", Budget(max_kl=most), small("fast"))
    assert report.budget is not None
    assert 0.8 * most < report.budget.kl <= most
    assert report.budget.bits_per_weight < chosen.budget.bits_per_weight
    assert report.budget.lm_head_bits == 8
    with pytest.raises(ToolError, match=r"--max-kl 1e-09: the least KL that formats of this .* is 0\.\d+"):
        made(folder, "none", Budget(max_kl=1e-9), small("fast"))
    assert not (folder / "none").exists()


def test_weights_and_cache_fit_the_memory(folder: Path) -> None:
    tight, wide = (
        made(folder, f"fit-{size}", Budget(fit=size, context=1000), small("fast")) for size in (2_100_000, 3_500_000)
    )
    for size, report in ((2_100_000, tight), (3_500_000, wide)):
        basis = sum(tensor.nbytes for tensor in load_file(folder / f"fit-{size}" / BASIS_WEIGHTS).values())
        held = report.total_bytes - basis  # which no server holds
        assert held + 1000 * report.kv_bytes_per_token <= (1 - RESERVE) * size
        assert report.budget is not None
        keys, values = report.budget.cache_bits
        cache = Checkpoint(folder / f"fit-{size}").config.kv_cache
        assert cache is not None
        assert cache.num_bits == (keys, values)
    assert tight.budget is not None
    assert wide.budget is not None
    assert wide.budget.kl < tight.budget.kl
    assert wide.budget.cache_bits == (8, 8)
    with pytest.raises(ToolError, match=r"--fit 0\.001 GB: weights and a cache of 1000 tokens need 0\.00205 GB at"):
        made(folder, "none", Budget(fit=1_000_000, context=1000), small("fast"), dry_run=True)


def test_an_interrupted_run_keeps_what_it_measured(folder: Path, chosen: Report) -> None:
    stages: list[str] = []

    def interrupt(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "layers" and done == 1:
            raise KeyboardInterrupt

    def note(stage: str, done: int, total: int, detail: str = "") -> None:
        stages.append(stage)

    budget, recipe = Budget(target_bits=4.6), small("fast")
    with pytest.raises(KeyboardInterrupt):
        made(folder, "resumed/chosen", budget, recipe, resume=True, progress=interrupt)
    with pytest.raises(ToolError, match=r"budget was 4\.6 bits per weight, is 4\.7 bits per weight"):
        made(folder, "resumed/chosen", Budget(target_bits=4.7), recipe, resume=True)
    report = made(folder, "resumed/chosen", budget, recipe, resume=True, progress=note)
    assert "layers" in stages
    assert "sensitivity" not in stages
    assert report.budget == chosen.budget
    assert digests(folder / "resumed/chosen") == digests(folder / "chosen")


def test_a_dry_run_says_what_bits_can_be_reached(folder: Path) -> None:
    report = made(folder, "dry", Budget(target_bits=4.6), small("fast"), dry_run=True)
    assert report.plan is not None
    assert report.plan.bits_per_weight is not None
    least, most = report.plan.bits_per_weight
    assert 4 < least < 4.6 < 8 < most < 8.4
    assert "sensitivity" in [stage.name for stage in report.plan.stages]
    with pytest.raises(ToolError, match=rf"--target-bits 4: the least that these formats reach is {least:.4f} bits"):
        made(folder, "dry", Budget(target_bits=4.0), small("fast"), dry_run=True)
    assert not (folder / "dry").exists()


@pytest.mark.parametrize(
    ("preset", "size", "message"),
    [
        ("rtn", "tied", "rounding 'rtn'"),
        ("kv4", "tied", "rounding 'none'"),
        ("paper", "tied", "transform 'psot-layer'"),
        ("fast", "mixtral", "a mixture of experts"),
    ],
)
def test_what_a_budget_does_not_choose_for_is_refused_by_name(
    tmp_path: Path, preset: str, size: str, message: str
) -> None:
    source = write_source(tmp_path / "source", **SIZES[size])
    with pytest.raises(ToolError, match=f"a budget does not go with {message}; choose a dense model and preset fast"):
        quantize(source, tmp_path / "out", preset=preset, budget=Budget(target_bits=5.0), progress=silent)


def test_a_recipe_that_a_budget_made_is_no_base_of_another(folder: Path, chosen: Report) -> None:
    with pytest.raises(ToolError, match="a budget does not go with a recipe with layers"):
        made(folder, "none", Budget(target_bits=5.0), load_recipe(folder / "chosen/infoquant_recipe.yaml"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bits": 4.5, "max_kl": 0.1}, "--target-bits and --max-kl: give one of"),
        ({"max_kl": 0.1, "fit": 10**9, "context": 10}, "--max-kl and --fit: give one of"),
        ({"context": 10}, "no budget: give one of --target-bits, --max-kl, --fit"),
        ({"fit": 10**9}, "goes with --fit, and --fit with --context"),
        ({"target_bits": 4.5, "context": 10}, "goes with --fit, and --fit with --context"),
        ({"target_bits": -1.0}, r"--target-bits is -1\.0, expected a number above 0"),
        ({"max_kl": float("nan")}, "--max-kl is nan"),
        ({"fit": 10**9, "context": 0}, "--context is 0"),
    ],
)
def test_contradictory_budgets_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ToolError, match=message):
        Budget(**options)


def test_sizes_and_tokens_are_read_with_units() -> None:
    assert read_budget(None, None, None, None) is None
    assert read_budget(None, None, "24GB", "64k") == Budget(fit=24 * 10**9, context=65_536)
    assert read_budget(None, None, "1.5 GiB", "1000") == Budget(fit=3 * 2**29, context=1000)
    for text in ("24 XB", "-1", "nan", "", "1e9"):
        with pytest.raises(ToolError, match=r"--fit is .*, expected a number with or without one of"):
            read_budget(None, None, text, "1")


def test_every_preset_that_may_be_a_base_has_choices(folder: Path) -> None:
    assert torch.get_default_dtype() == torch.float32
    for preset in ("fast", "best", "balanced", "w4a8kv4", "w4a16kv4"):
        assert preset in PRESETS
        report = made(folder, "dry", Budget(target_bits=5.0), small(preset), dry_run=True)
        assert report.plan is not None
        assert report.plan.bits_per_weight is not None
