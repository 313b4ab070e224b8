"""The page of `infoquant report` is complete, its figures follow their definitions, and hostile text stays text."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import infoquant_vllm.kernels.torch.quantize as quantizers
import offline
import offline.evaluate.page.measure as measuring
from infoquant_vllm.format import ActivationArgs, Checkpoint
from offline.cli.main import app
from offline.errors import ToolError
from offline.evaluate.page import make
from offline.evaluate.page.distribution import BINS, BINS_PER_RMS, Distribution, Quantized
from offline.evaluate.page.make import make_page
from offline.evaluate.page.measure import _quantized_entries, _quantized_input, clips, measure
from offline.evaluate.page.summary import Summary, mean
from offline.evaluate.simulated import SimulatedCache
from offline.model.source import Source
from offline.progress import silent
from offline.recipe import Recipe
from tests.common.checkpoints import write_random
from tests.common.tiny import VOCAB_SIZE, write_source

SECTIONS = ("verdict", "sites", "criteria", "histograms", "errors", "clips", "numbers", "recipe")
SITES = ["qkv", "o", "gate_up", "down", "k", "v"]
HOSTILE = "</title><script>alert(1)</script>\"'&\ud800"


def distribution(groups: torch.Tensor, quantized: Quantized | None = None) -> Distribution:
    found = Distribution()
    found.add(groups, quantized)
    return found


def test_values_spread_evenly_over_16_levels_have_4_bits() -> None:
    found = distribution(torch.arange(16.0).repeat(3, 4) - 5).figures()
    assert found.entropy == pytest.approx(4)
    torch.testing.assert_close(found.occupancy, torch.full((16,), 1 / 16, dtype=torch.float64))


def test_values_on_two_levels_have_their_bits() -> None:
    halves, quarter = torch.tensor([[-1.0, -1.0, 1.0, 1.0]]), torch.tensor([[-1.0, 1.0, 1.0, 1.0]])
    assert distribution(halves).figures().entropy == pytest.approx(1)
    bits = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    assert distribution(quarter).figures().entropy == pytest.approx(bits)
    both = distribution(halves)
    both.add(quarter, None)
    assert both.figures().entropy == pytest.approx((1 + bits) / 2)
    assert both.figures().occupancy[:3].tolist() == pytest.approx([0.625, 0.375, 0])


def test_range_is_in_units_of_the_rms_and_holds_zero() -> None:
    found = distribution(torch.tensor([[3.0, -4.0, 0.0, 0.0]]))
    assert found.figures().range == pytest.approx(7 / 2.5)
    found.add(torch.tensor([[2.0, 2.0, 2.0, 2.0]]), None)
    assert found.figures().range == pytest.approx((7 / 2.5 + 1) / 2)


def test_scale_of_a_group_changes_nothing() -> None:
    groups = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    one, other = (
        distribution(x).figures() for x in (groups, groups * torch.tensor([1e-6, 1.0, 7.0, 1e3, 1e6])[:, None])
    )
    assert (one.range, one.entropy) == pytest.approx((other.range, other.entropy))


def test_histogram_is_a_density() -> None:
    density = distribution(torch.tensor([[1.0, -1.0, 1.0, 1.0]])).figures().density
    assert density.sum().item() / BINS_PER_RMS == pytest.approx(1)
    assert density[BINS // 2 + BINS_PER_RMS].item() / BINS_PER_RMS == pytest.approx(0.75)
    assert density[BINS // 2 - BINS_PER_RMS].item() / BINS_PER_RMS == pytest.approx(0.25)


def test_error_is_the_share_of_each_groups_energy() -> None:
    groups = torch.tensor([[3.0, 4.0], [100.0, 0.0]])
    quantized = Quantized(torch.tensor([[3.0, 3.0], [90.0, 0.0]]), torch.zeros(2), torch.tensor([5.0, 100.0]))
    found = distribution(groups, quantized).figures()
    assert found.error == pytest.approx((1 / 25 + 100 / 10000) / 2)
    assert found.levels == pytest.approx((0, math.sqrt(2)))
    assert distribution(groups).figures().error is None


def test_groups_of_zeros_are_left_out() -> None:
    found = distribution(torch.zeros(2, 8)).figures()
    assert math.isnan(found.range)
    assert math.isnan(found.entropy)
    both = distribution(torch.tensor([[0.0, 0.0], [1.0, -1.0]])).figures()
    assert (both.range, both.entropy) == pytest.approx((2, 1))
    assert mean([math.nan, None, 1.0, 3.0]) == 2


@pytest.mark.parametrize("symmetric", [False, True])
def test_outer_levels_are_those_of_the_codes(symmetric: bool) -> None:
    y = torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
    args = ActivationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=32)
    groups, found = _quantized_input(y, args, torch.full((4, 2), 0.6))
    assert found is not None
    assert groups.shape == (28, 32)
    torch.testing.assert_close(groups.view(7, 128), y)
    rounding = 0.5 * y.abs().max() / 127  # of levels to the int8 values of the scale that groups share
    torch.testing.assert_close(found.highest, found.values.amax(1), rtol=0, atol=rounding)  # clipping fills them
    if not symmetric:
        torch.testing.assert_close(found.lowest, found.values.amin(1), rtol=0, atol=rounding)
    assert (found.values >= found.lowest[:, None] - rounding).all()


def test_outer_levels_of_the_cache_are_those_of_its_codes() -> None:
    x = torch.randn(1, 2, 5, 64, generator=torch.Generator().manual_seed(2))
    groups, found = _quantized_entries(x, 4, torch.full((2, 2), 0.6), None)
    torch.testing.assert_close(groups.view(x.shape), x)
    torch.testing.assert_close(found.lowest, found.values.amin(1), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found.highest, found.values.amax(1), rtol=2e-3, atol=1e-3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("page") / "source")


@pytest.fixture(scope="module")
def plain(source: Path) -> Path:
    """Quantize to 8 bits without rotation or clipping: nearly the source's own values at every site."""
    site = {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}, "clip_ratio": 1.0}
    fields = {
        "name": "eight",
        "transform": "none",
        "rounding": "rtn",
        "sites": dict.fromkeys(("qkv", "o", "gate_up", "down"), site),
        "kv_cache": {"key_bits": 8, "value_bits": 8, "key_clip_ratio": 1.0, "value_clip_ratio": 1.0},
    }
    return _quantized(source, "eight", Recipe.model_validate(fields))


@pytest.fixture(scope="module")
def rotated(source: Path) -> Path:
    fields = {
        "name": "rotated",
        "transform": "hadamard",
        "rounding": "gptq",
        "calibration": {"sequences": 4, "sequence_length": 32},
    }
    return _quantized(source, "rotated", Recipe.model_validate(fields))


def _quantized(source: Path, name: str, recipe: Recipe) -> Path:
    offline.quantize(source, source.with_name(name), recipe=recipe, progress=lambda *_: None)
    return source.with_name(name)


@pytest.fixture(scope="module")
def page(rotated: Path, source: Path) -> tuple[Summary, str]:
    file = rotated.with_name("page.html")
    return make_page(rotated, file, source=source), file.read_text(encoding="utf-8")


def tokens() -> list[torch.Tensor]:
    return list(torch.randint(3, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(3)))


def test_what_is_measured_is_what_the_simulation_quantizes(rotated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[str, str], list[torch.Tensor]] = {}

    def record(module: ModuleType, name: str) -> None:
        function, values = getattr(module, name), seen.setdefault((module.__name__, name), [])
        monkeypatch.setattr(module, name, lambda x, *args: values.append(x) or function(x, *args))

    for module, name in (
        (quantizers, "quantize_groups"),
        (measuring, "quantize_groups"),
        (measuring, "fake_store"),
    ):
        record(module, name)
    stored: list[torch.Tensor] = []
    attend = SimulatedCache.attend

    def record_cells(cache: SimulatedCache, *args: Any) -> torch.Tensor:
        stored.extend((cache.rotate(args[1]), args[2]))
        return attend(cache, *args)

    monkeypatch.setattr(SimulatedCache, "attend", record_cells)
    measure(Checkpoint(rotated), None, tokens()[:1], silent)
    cells = seen["offline.evaluate.page.measure", "fake_store"]
    inputs = (
        seen["offline.evaluate.page.measure", "quantize_groups"],
        seen["infoquant_vllm.kernels.torch.quantize", "quantize_groups"],
    )
    assert len(cells) == len(stored) == 2 * 2
    assert all(map(torch.equal, cells, stored))
    firsts = [linear for layer in (0, 7) for linear in (layer, layer + 3, layer + 4, layer + 6)]
    assert len(inputs[1]) == 2 * 7
    assert all(map(torch.equal, inputs[0], [inputs[1][linear] for linear in firsts]))


def test_keys_are_measured_with_the_feedback_of_their_errors(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kv_cache = {"key_mean_positions": 64, "key_feedback": True}
    calibration = {"sequences": 4, "sequence_length": 32}
    fields = {"name": "fed", "transform": "heads", "rounding": "none", "kv_cache": kv_cache, "calibration": calibration}
    checkpoint = Checkpoint(_quantized(source, "fed", Recipe.model_validate(fields)))
    given: list[torch.Tensor | None] = []
    store = measuring.fake_store
    monkeypatch.setattr(measuring, "fake_store", lambda *args: given.append(args[3]) or store(*args))
    measure(checkpoint, None, tokens()[:1], silent)
    expected = [checkpoint.tensor(f"model.layers.{layer}.self_attn.attn.key_feedback") for layer in (0, 1)]
    assert [one is None for one in given] == [False, True] * 2
    assert all(torch.equal(one, other) for one, other in zip(given[::2], expected, strict=True) if one is not None)


def test_unrotated_checkpoint_is_measured_where_its_source_is(plain: Path, source: Path) -> None:
    found = measure(Checkpoint(plain), Source.open(source), tokens(), silent)
    assert found.before is not None
    assert list(found.after) == list(found.before) == SITES
    for site in SITES:
        for ours, theirs in zip(found.after[site], found.before[site], strict=True):
            assert ours.range == pytest.approx(theirs.range, rel=0.05), site
            assert ours.entropy == pytest.approx(theirs.entropy, rel=0.05), site
            assert (ours.density - theirs.density).abs().sum() / BINS_PER_RMS < 0.4, site


def test_rotation_makes_the_range_smaller_and_the_entropy_larger(rotated: Path, source: Path) -> None:
    found = measure(Checkpoint(rotated), Source.open(source), tokens(), silent)
    assert found.before is not None
    for site in ("qkv", "down"):  # the source's weights have large columns
        assert found.after[site][1].range < found.before[site][1].range
        assert found.after[site][1].entropy > found.before[site][1].entropy
        assert found.after[site][1].error < found.before[site][1].error


def test_clips_are_those_of_the_file(rotated: Path) -> None:
    found = clips(Checkpoint(rotated))
    assert list(found) == SITES
    assert [clip.shape for clip in found["o"]] == [(4, 2)] * 2
    assert torch.stack(found["qkv"]).unique().tolist() == pytest.approx([0.9])
    assert torch.stack(found["v"]).unique().tolist() == pytest.approx([0.95])


def test_page_has_every_section_and_needs_nothing_else(page: tuple[Summary, str]) -> None:
    summary, text = page
    for section in SECTIONS:
        assert f'id="{section}"' in text
    assert "no-source" not in text
    assert len(text) < 3_000_000
    assert "<script" not in text
    references = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert len(references) == 4 + len(SITES)
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in references)
    assert summary.worst_input is not None
    assert f"layer {summary.worst_input.layer}" in text
    assert "psot" in text
    assert "rounding: gptq" in text
    assert "nan" not in re.sub(r'src="[^"]*"', "", text)


def test_worst_places_are_the_largest_errors(page: tuple[Summary, str], rotated: Path) -> None:
    summary, _ = page
    inputs = {(place, layer): e for place, f in summary.after.items() for layer, e in enumerate(f.error)}
    worst = summary.worst_input
    assert worst is not None
    assert inputs[worst.place, worst.layer] == worst.error == max(e for e in inputs.values() if e is not None)
    errors = json.loads((rotated / "infoquant_report.json").read_text())["errors"]
    assert summary.worst_weight is not None
    assert summary.worst_weight.error == max(errors.values())
    assert summary.weight_errors["down_proj"] == [errors[f"model.layers.{layer}.mlp.down_proj"] for layer in (0, 1)]


def test_hostile_records_stay_text(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "a<b>&c"))
    report = json.loads((folder / "infoquant_report.json").read_text())
    report |= {"source": HOSTILE, "calibration": HOSTILE, "calibration_sha256": HOSTILE}
    report |= {"seconds": {HOSTILE: 1.0}, "errors": {HOSTILE: 1.0, "model.layers.0.mlp.down_proj": math.nan}}
    (folder / "infoquant_report.json").write_text(json.dumps(report))
    (folder / "infoquant_recipe.yaml").write_text(json.dumps({"name": HOSTILE[:-1], "<img src=x>": "<b>"}))
    make_page(folder)
    text = (tmp_path / "a<b>&c-report.html").read_text(encoding="utf-8")
    tags: set[str] = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.add(tag)  # type: ignore[method-assign]
    parser.feed(text)
    assert not tags & {"script", "b"}
    assert text.count("<img ") == 4 + len(SITES)
    assert "&lt;script&gt;alert(1)" in text
    assert "<h1>a&lt;b&gt;&amp;c</h1>" in text


def budget_records(**changes: object) -> dict[str, object]:
    site = {"weights": "4 bits, groups of 32", "inputs": "4 bits", "kl": 0.0125}
    found = {
        "base": "fast",
        "goal": "4.5 bits per weight",
        "kl": 0.1,
        "base_kl": 0.15,
        "bits_per_weight": 4.49,
        "base_bits_per_weight": 4.07,
        "lm_head_bits": 16,
        "cache_bits": [4, 4],
        "curve": [[4.07, 0.14], [4.49, 0.1], [8.07, 0.08]],
        "uniform": {"4 bits": [4.07, 0.15], "8 bits": [8.07, 0.09]},
        "sites": {key: [site, site | {"weights": "8 bits"}] for key in SITES[:4]},
    }
    return found | changes


def with_budget(plain: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(plain, folder)
    report = json.loads((folder / "infoquant_report.json").read_text()) | {"budget": budget_records(**changes)}
    (folder / "infoquant_report.json").write_text(json.dumps(report))
    return folder


def test_page_of_a_budget_shows_its_formats_and_the_curve(plain: Path, tmp_path: Path) -> None:
    make_page(with_budget(plain, tmp_path / "budget", goal=HOSTILE[:-1]))
    text = (tmp_path / "budget-report.html").read_text()
    assert 'id="budget"' in text
    assert text.count("<img ") == 5 + len(SITES)
    assert "predicted KL 0.1000 nats per token at 4.490 bits per weight, of the base 0.1500 at 4.070" in text
    assert text.count("<td>8 bits</td>") == 4
    assert "<script" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uniform": {"$x$": [4.0, 0.1]}}, r"budget\.uniform"),
        ({"curve": [[4.0, math.nan]]}, r"budget\.curve"),
        ({"sites": {"<b>": []}}, r"budget\.sites"),
        ({"sites": {"qkv": [{"weights": "<b>", "inputs": "4 bits", "kl": 1.0}]}}, r"budget\.sites\.qkv\.0\.weights"),
    ],
)
def test_a_budget_of_another_kind_is_refused(
    plain: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ToolError, match=message):
        make_page(with_budget(plain, tmp_path / "budget", **changes))


def test_records_of_another_kind_are_refused(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "checkpoint"))
    (folder / "infoquant_report.json").write_text('{"errors": "none"}')
    with pytest.raises(ToolError, match=r"infoquant_report\.json: .*errors: Input should be a valid dictionary"):
        make_page(folder)


def test_page_without_source_records_or_cache_says_so(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "bare", {"kv_cache": None}, vocab_size=VOCAB_SIZE)
    for file in write_source(tmp_path / "source").glob("tokenizer*"):
        shutil.copy(file, folder)
    summary, text = make_page(folder), (tmp_path / "bare-report.html").read_text()
    assert list(summary.after) == SITES[:4]
    assert summary.before is None
    assert "range before" not in text
    for said in (
        "add <code>--source SOURCE</code>",
        "The run recorded no errors of rounding weights",
        "The checkpoint has no recipe.",
    ):
        assert said in text


def test_overwrite_replaces_nothing_but_pages(rotated: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("mine")
    with pytest.raises(ToolError, match="exists already; give another --output, or pass --overwrite"):
        make_page(rotated, file)
    with pytest.raises(ToolError, match="not a page of this tool"):
        make_page(rotated, file, overwrite=True)
    assert file.read_text() == "mine"


def test_unwritable_folder_is_refused_at_once(rotated: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ToolError, match=r"page\.html: cannot be written"):
        make_page(rotated, tmp_path / "file" / "page.html")


def test_source_of_another_size_is_refused(rotated: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(ToolError, match=r"other: not the source of .*rotated, sizes differ"):
        make_page(rotated, tmp_path / "page.html", source=other)
    assert not (tmp_path / "page.html").exists()


def test_missing_matplotlib_is_named_with_its_fix(
    rotated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolError, match=r"matplotlib.*pip install 'infoquant-vllm\[report\]'"):
        make_page(rotated, tmp_path / "page.html")


def test_command_replaces_a_page_and_prints_the_figures(plain: Path, tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "page.html"
    text.write_text("sentence of many. " * 150)
    file.write_text(make.GENERATOR)
    arguments = ["report", str(plain), "--output", str(file), "--corpus", str(text), "--json"]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    done = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["page"], found["tokens"], found["windows"]) == (str(file), 2048, 4)
    assert len(found["after"]["k"]["entropy"]) == 2
    assert 'id="verdict"' in file.read_text()
    assert sorted(tmp_path.iterdir()) == [file, text]
