"""`quantize` writes whole checkpoints, the same for the same seed, and refuses wrong recipes and sizes."""

import hashlib
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from infoquant_vllm.format import (
    BASIS_WEIGHTS,
    Checkpoint,
    WeightArgs,
    files_of,
    read_basis,
    read_projection,
    unpack_codes,
)
from offline import PRESETS, Recipe, ToolError, load_recipe, quantize
from offline.evaluate.verify import verify
from offline.formats import Site, SiteActivations, Sites
from offline.model.source import Source
from offline.progress import silent
from offline.recipe import CalibrationSize, Distillation, LearnedClips, Psot, PsotLayer
from tests.common.tiny import MIXTURES, SIZES, write_source

SMALL = {
    "calibration": CalibrationSize(sequences=4, sequence_length=64),
    "psot": Psot(steps=3),
    "psot_layer": PsotLayer(epochs=1),
}
CLIPS = LearnedClips(sequences=1, epochs=2)
TEXT = "".join(f"The number {n} is followed by {n + 1}, and its square is {n * n}.\n\n" for n in range(300))


def small(preset: str) -> Recipe:
    recipe = PRESETS[preset]
    steps = {"learned_clips": CLIPS, "distillation": Distillation(steps=2, warmup_steps=1)}
    used = {name: value for name, value in steps.items() if getattr(recipe, name) is not None}
    return recipe.model_copy(update=SMALL | used)


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the report, which has timings."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "infoquant_report.json"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


DENSE = [size for size in SIZES if size not in ("odd", *MIXTURES)]
RUNS = sorted(
    {(preset, size) for preset in PRESETS for size in ("tied", "qwen3")}
    | set(product(("fast", "paper"), DENSE))
    | set(product(("fast",), MIXTURES))
)
"""Every preset on two model families, and both kinds of learned rotations on all."""


@pytest.mark.parametrize(("preset", "size"), RUNS)
def test_every_preset_writes_a_whole_checkpoint(tmp_path: Path, text: str, preset: str, size: str) -> None:
    source = write_source(tmp_path / "source", **SIZES[size])
    report = quantize(source, tmp_path / "out", recipe=small(preset), calibration=text, progress=silent)
    checkpoint = Checkpoint(tmp_path / "out")
    for name in checkpoint.weight_map:
        checkpoint.tensor(name)  # raises for NaN, and for scales and clips that are not positive
    projection = read_projection(files_of(tmp_path / "out"), checkpoint.shape.hidden_size, "out")
    beside = 0 if projection is None else projection.nbytes
    if size not in MIXTURES:
        basis = read_basis(checkpoint)  # raises where its fingerprint is not that of its tensors
        assert basis is not None
        beside += sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / BASIS_WEIGHTS).values())
    assert report.total_bytes == beside + sum(checkpoint.tensor(name).nbytes for name in checkpoint.weight_map)
    assert report.source_bytes == sum(file.stat().st_size for file in source.glob("*.safetensors")) - header(source)


@pytest.mark.parametrize("preset", ["rtn", "quarot", "paper", "fast"])
def test_sizes_that_are_not_powers_of_two_are_quantized(tmp_path: Path, text: str, preset: str) -> None:
    source = write_source(tmp_path / "source", **SIZES["odd"])
    quantize(source, tmp_path / "out", recipe=small(preset), calibration=text, progress=silent)
    assert Checkpoint(tmp_path / "out").shape.intermediate_size == 1376


@pytest.mark.parametrize("preset", ["best", "balanced", "w4a8kv4", "w4a16kv4"])
def test_groups_that_do_not_divide_a_size_are_refused_by_name(tmp_path: Path, text: str, preset: str) -> None:
    source = write_source(tmp_path / "source", hidden_size=288, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(ToolError, match=f"recipe '{preset}' does not suit .*group_size 64 does not divide its 288"):
        quantize(source, tmp_path / "out", recipe=small(preset), calibration=text, progress=silent)
    assert not (tmp_path / "out").exists()


def test_recipe_of_the_reproduction_page_is_valid() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reproduction.md").read_text()
    recipe = Recipe.model_validate(yaml.safe_load(page.split("```yaml\n")[1].split("```")[0]))
    assert recipe.calibration.sequences * recipe.calibration.sequence_length == 128 * 2048


def header(source: Path) -> int:
    """Return the header bytes of the only shard."""
    with (source / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_in_the_file_use_their_bits_and_stay_within_them(tmp_path: Path, text: str, symmetric: bool) -> None:
    site = Site(weights=WeightArgs(num_bits=4, symmetric=symmetric))
    recipe = small("quarot").model_copy(update={"sites": Sites(qkv=site, gate_up=site, down=site)})
    quantize(write_source(tmp_path / "source"), tmp_path / "out", recipe=recipe, calibration=text, progress=silent)
    checkpoint = Checkpoint(tmp_path / "out")
    packed = checkpoint.tensor("model.layers.1.mlp.down_proj.weight_packed")
    codes = unpack_codes(packed, 4, signed=symmetric)
    assert packed.shape == (256, 160)
    assert set(codes.unique().tolist()) == set(range(-8, 8) if symmetric else range(16))


def test_groups_8_bits_and_unquantized_inputs_are_written_as_the_recipe_says(tmp_path: Path, text: str) -> None:
    groups = WeightArgs(num_bits=4, symmetric=False, strategy="group", group_size=64)
    sites = Sites(
        qkv=Site(weights=groups, input_activations=SiteActivations(strategy="group", group_size=64)),
        gate_up=Site(weights=WeightArgs(num_bits=8), input_activations=SiteActivations(num_bits=16)),
    )
    recipe = small("quarot").model_copy(update={"sites": sites, "kv_cache": None})
    quantize(write_source(tmp_path / "source"), tmp_path / "out", recipe=recipe, calibration=text, progress=silent)
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.tensor("model.layers.0.self_attn.q_proj.weight_scale").shape == (256, 1)
    assert checkpoint.tensor("model.layers.0.self_attn.q_proj.weight_multiplier").shape == (256, 4)
    assert checkpoint.tensor("model.layers.0.self_attn.q_proj.weight_zero_point").shape == (256, 4)
    assert checkpoint.tensor("model.layers.0.self_attn.q_proj.input_clip_ratio").shape == (4, 2)
    assert checkpoint.tensor("model.layers.0.mlp.up_proj.weight_packed").shape == (320, 256)
    assert "model.layers.0.mlp.up_proj.input_clip_ratio" not in checkpoint.weight_map
    assert "model.layers.0.self_attn.attn.key_clip_ratio" not in checkpoint.weight_map


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_same_seed_same_bytes_and_another_seed_other_bytes(tmp_path: Path, text: str, preset: str) -> None:
    source = write_source(tmp_path / "source", dtype=torch.bfloat16)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(source, tmp_path / name, recipe=small(preset), calibration=text, seed=seed, progress=silent)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert {k: v for k, v in a.items() if k != "README.md"} == {k: v for k, v in b.items() if k != "README.md"}
    assert a["model-00001-of-00001.safetensors"] != c["model-00001-of-00001.safetensors"]


def test_source_in_several_shards_gives_the_same_codes(tmp_path: Path, text: str) -> None:
    one = write_source(tmp_path / "one")
    many = write_source(tmp_path / "many", max_shard_size="400KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    for name, source in (("a", one), ("b", many)):
        quantize(source, tmp_path / name, recipe=small("quarot"), calibration=text, progress=silent)
    name = "model-00001-of-00001.safetensors"
    assert digests(tmp_path / "a")[name] == digests(tmp_path / "b")[name]


def test_tied_model_stays_tied_and_keeps_its_embeddings(tmp_path: Path, text: str) -> None:
    source = write_source(tmp_path / "source", dtype=torch.bfloat16)
    quantize(source, tmp_path / "out", recipe=small("quarot"), calibration=text, progress=silent)
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.config.online_r1
    assert "lm_head.weight" not in checkpoint.weight_map
    assert checkpoint.tensor("model.embed_tokens.weight").dtype == torch.bfloat16


def test_dry_run_predicts_the_sizes_and_writes_nothing(tmp_path: Path, text: str) -> None:
    source = write_source(tmp_path / "source")
    dry = quantize(source, tmp_path / "out", recipe=small("quarot"), dry_run=True, progress=silent)
    assert not (tmp_path / "out").exists()
    real = quantize(source, tmp_path / "out", recipe=small("quarot"), calibration=text, progress=silent)
    assert (dry.linear_bytes, dry.total_bytes) == (real.linear_bytes, real.total_bytes)


@pytest.mark.parametrize("preset", PRESETS)
def test_recipe_survives_its_yaml(tmp_path: Path, preset: str) -> None:
    (tmp_path / "recipe.yaml").write_text(PRESETS[preset].dump())
    assert load_recipe(tmp_path / "recipe.yaml") == PRESETS[preset]


PUBLISHED = """\
name: paper-as-published
transform: psot-layer
rounding: gptq
calibration: {sequences: 128, sequence_length: 2048}
psot_layer: {blocks: 4, epochs: 15}
learned_clips: {sequences: 128, batch_sequences: 4}
"""


def test_published_setting_is_a_valid_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(PUBLISHED)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.psot_layer == PsotLayer(blocks=4, epochs=15, learning_rate=2.0, last_learning_rate=0.02)
    assert recipe.learned_clips == LearnedClips(sequences=128, epochs=5, batch_sequences=4, learning_rate=0.05)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("name: x\ntransform: spin\nrounding: rtn\n", "transform"),
        ("name: x\ntransform: none\nrounding: rtn\nbits: 4\n", "bits"),
        ("name: x\ntransform: none\nrounding: rtn\nsites: {o: {clip_ratio: 1.5}}\n", "sites.o.clip_ratio"),
        ("name: x\ntransform: hadamard\nrounding: none\n", "rounding 'none' goes with 'heads'"),
        ("name: x\ntransform: heads\nrounding: none\nequalize: true\n", "equalize reads the statistics of GPTQ"),
        ("name: x\ntransform: heads\nrounding: none\ndistillation: {}\n", "distillation trains the scales of weights"),
        ("name: x\ntransform: heads\nrounding: none\nkv_cache: null\n", "quantizes nothing"),
        ("name: x\ntransform: none\nrounding: rtn\nequalize: true\n", "equalize reads the statistics of GPTQ"),
        ("name: x\ntransform: none\nrounding: rtn\ngptq: {refinements: 1}\n", "gptq.refinements reads"),
        (
            "name: x\ntransform: none\nrounding: rtn\nsites: {qkv: {clip_ratio: search}}\n",
            "sites.qkv.clip_ratio 'search' reads",
        ),
        ("[1, 2]\n", "mapping"),
        ("a: [\n", "YAML"),
    ],
)
def test_wrong_recipe_is_refused_naming_file_and_field(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ToolError, match=named) as refusal:
        load_recipe(file)
    assert str(file) in str(refusal.value)


def test_paper_leaves_the_residual_stream_in_the_sources_basis(tmp_path: Path, text: str) -> None:
    source = write_source(tmp_path / "source", dtype=torch.bfloat16)
    quantize(source, tmp_path / "out", recipe=small("paper"), calibration=text, progress=silent)
    checkpoint, opened = Checkpoint(tmp_path / "out"), Source.open(source)
    assert not checkpoint.config.online_r1
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(checkpoint.tensor(name), opened.tensor(name))
    blocks = [checkpoint.tensor(f"model.layers.{layer}.mlp.up_proj.input_blocks") for layer in (0, 1)]
    assert blocks[0].shape == (2, 128, 128)
    assert not torch.equal(*blocks)
    clip = checkpoint.tensor("model.layers.1.self_attn.o_proj.input_clip_ratio")
    assert clip.shape == (4, 2)
    assert len(clip.unique()) == 8


def test_blocks_that_do_not_divide_are_refused_before_anything_runs(tmp_path: Path) -> None:
    recipe = small("paper").model_copy(update={"psot_layer": PsotLayer(blocks=3)})
    with pytest.raises(ToolError, match="blocks 3 does not divide the hidden size 256"):
        quantize(write_source(tmp_path / "source"), tmp_path / "out", recipe=recipe, progress=silent)
    assert not (tmp_path / "out").exists()


def test_group_size_that_does_not_divide_is_refused_before_anything_runs(tmp_path: Path) -> None:
    site = Site(weights=WeightArgs(num_bits=4, strategy="group", group_size=100))
    recipe = small("rtn").model_copy(update={"sites": Sites(down=site)})
    with pytest.raises(ToolError, match="100 does not divide its 320"):
        quantize(write_source(tmp_path / "source"), tmp_path / "out", recipe=recipe, progress=silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", DENSE)
def test_kv4_keeps_every_tensor_of_the_source_but_v_proj_and_o_proj(tmp_path: Path, text: str, size: str) -> None:
    source = write_source(tmp_path / "source", dtype=torch.bfloat16, **SIZES[size])
    report = quantize(source, tmp_path / "out", recipe=small("kv4"), calibration=text, progress=silent)
    checkpoint, opened = Checkpoint(tmp_path / "out"), Source.open(source)
    changed = {name for name in opened.names if not torch.equal(checkpoint.tensor(name), opened.tensor(name))}
    assert {name.split(".")[-2] for name in changed} == {"v_proj", "o_proj"}
    assert not checkpoint.config.config_groups
    assert not checkpoint.config.rotated_hidden_states
    assert 3.5 <= report.source_kv_bytes_per_token / report.kv_bytes_per_token < 4 or size == "one-kv-head"
    assert verify(tmp_path / "out", against=source).passed
