"""Distillation: the student is the checkpoint that was rounded, and training makes it predict as the source does."""

from pathlib import Path

import pytest
import torch

import offline
from infoquant_vllm.format import Checkpoint, WeightArgs
from offline.algorithms.rotations import Transforms, random_hadamard, random_head_rotations
from offline.evaluate.metrics import compare
from offline.evaluate.simulate import load_simulated
from offline.formats import Site, SiteActivations, Sites
from offline.model.source import Source
from offline.presets import PRESETS
from offline.progress import silent
from offline.recipe import CalibrationSize, Distillation, Gptq, KVCache, Psot, Recipe
from offline.stages.distill import final_hidden
from offline.stages.fold import fold_layer
from offline.stages.quantize_layer import LayerInputs, quantize_layer
from offline.text import text_windows
from offline.training.student import Student
from tests.common.tiny import SIZES, write_source

TRAINED = Distillation(steps=12, batch_sequences=2, warmup_steps=2)
SITE_NAMES = tuple(Sites.model_fields)
GROUPS = WeightArgs(num_bits=4, symmetric=False, strategy="group", group_size=32)
ASYMMETRIC_GROUPS = Sites(
    **{name: getattr(Sites(), name).model_copy(update={"weights": GROUPS}) for name in SITE_NAMES}
)


def recipe(**changes: object) -> Recipe:
    """`fast` on a little text, with few steps."""
    small = {
        "calibration": CalibrationSize(sequences=6, sequence_length=64),
        "psot": Psot(steps=5),
        "gptq": Gptq(),
        "distillation": TRAINED,
    }
    return PRESETS["fast"].model_copy(update=small | changes)


def text(folder: Path) -> Path:
    """Words that repeat, so that even a random model's statistics have something to hold on to."""
    file = folder / "text.txt"
    file.write_text("\n\n".join("one two three four five six seven eight nine ten " * 8 for _ in range(60)))
    return file


def made(folder: Path, name: str, chosen: Recipe) -> Path:
    """A checkpoint of the tiny model in `folder` / source."""
    offline.quantize(folder / "source", folder / name, recipe=chosen, calibration=str(text(folder)), progress=silent)
    return folder / name


def divergence(folder: Path, checkpoint: Path) -> float:
    """KL of a checkpoint to the tiny model on windows of the text."""
    source = Source.open(folder / "source")
    windows = text_windows(str(text(folder)), source.tokenizer(), source.shape.vocab_size, 4, 64, seed=3)
    figures = compare(list(windows), load_simulated(checkpoint, torch.float32), source.model(torch.float32))
    return figures["kl"].mean


@pytest.mark.parametrize("size", ["tied", "untied-biases", "odd"])
@pytest.mark.parametrize("sites", [Sites(), ASYMMETRIC_GROUPS], ids=["channel", "asymmetric-groups"])
def test_a_student_that_learns_nothing_leaves_the_checkpoint_as_it_was(tmp_path: Path, size: str, sites: Sites) -> None:
    write_source(tmp_path / "source", **SIZES[size])
    still = Distillation(steps=1, scale_learning_rate=1e-30, clip_learning_rate=0.0)
    trained, plain = (
        Checkpoint(made(tmp_path, name, recipe(sites=sites, distillation=distillation)))
        for name, distillation in (("trained", still), ("plain", None))
    )
    assert trained.weight_map.keys() == plain.weight_map.keys()
    for name in plain.weight_map:
        assert torch.equal(trained.tensor(name), plain.tensor(name)), name


@pytest.mark.parametrize("size", ["tied", "untied-biases", "odd", "granite", "gemma2", "gemma3"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_student_in_eight_bits_predicts_as_its_source(tmp_path: Path, size: str, symmetric: bool) -> None:
    """In 8 bits, where codes that last bits flip do little."""
    weights = WeightArgs(num_bits=8, symmetric=symmetric)
    eight = Site(weights=weights, input_activations=SiteActivations(num_bits=8), clip_ratio=1.0)
    sites = Sites(**dict.fromkeys(SITE_NAMES, eight))
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    chosen = recipe(sites=sites, kv_cache=KVCache(key_bits=8, value_bits=8, value_clip_ratio=1.0))
    generator = torch.Generator().manual_seed(0)
    residual = random_hadamard(source.shape.hidden_size, generator) if source.shape.folds_r1 else None
    transforms = Transforms(residual, random_head_rotations(source.shape, generator))
    run_layers = []
    for layer in range(source.shape.num_hidden_layers):
        state = fold_layer(source, layer, transforms)
        run_layers.append(quantize_layer(LayerInputs(0, state), chosen, source.shape, torch.float32)[0])
    student = Student(source, chosen.quantization_config(source.shape), run_layers, transforms)
    tokens = torch.randint(3, 250, (2, 40), generator=generator)
    ours = student.head.logits(student(tokens)).log_softmax(-1)
    plain = source.model(torch.float32)(tokens).logits.log_softmax(-1)
    kl = (plain.exp() * (plain - ours)).sum(-1).mean()
    assert kl < 5e-3


def test_training_brings_the_model_nearer_to_its_source(tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    before, after = (
        divergence(tmp_path, made(tmp_path, name, recipe(distillation=distillation)))
        for name, distillation in (("before", None), ("after", TRAINED))
    )
    assert after < 0.9 * before


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    write_source(tmp_path / "source")
    first, second = (made(tmp_path, name, recipe()) for name in ("first", "second"))
    for file in first.glob("*.safetensors"):
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_targets_are_what_the_sources_head_reads(tmp_path: Path) -> None:
    source = Source.open(write_source(tmp_path / "source"))
    tokens = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    model = source.model(torch.float32)
    logits = final_hidden(source, tokens, silent) @ model.lm_head.weight.T
    torch.testing.assert_close(logits, model(tokens).logits)
