"""Zero, constant and huge rows, columns, heads and layers are quantized by every preset, or refused by name."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infoquant_vllm.format import Checkpoint
from offline import PRESETS, Recipe, Report, ToolError, quantize
from offline.evaluate.verify import check_all_values
from offline.progress import silent
from offline.recipe import (
    CalibrationSize,
    Distillation,
    LearnedClips,
    Psot,
    PsotLayer,
)
from offline.stages.calibrate import save_tokens
from tests.common.eight_bits import EIGHT_BITS, LARGEST_KL, PADDING, divergence
from tests.common.tiny import VOCAB_SIZE, write_source

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"
HIDDEN, HEAD_DIM, INNER = 64, 32, 128
FIRST = "model.layers.0."
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
}
EMBEDDING = "model.embed_tokens.weight"
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
SMALL = {
    "calibration": CalibrationSize(sequences=4, sequence_length=32),
    "psot": Psot(steps=3, batch_tokens=64, pool_tokens=256),
    "psot_layer": PsotLayer(epochs=2),
}
RECIPES = PRESETS | {"eight-bits": EIGHT_BITS}
STAGES = ("fast", "paper", "best", "eight-bits")
"""Recipes that cover every stage; the others have fewer stages or other bits."""


def fill(name: str, part: object, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][part] = value

    return change


def multiply(name: str, part: object, factor: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][part] *= factor

    return change


def zero_rows(tensors: Tensors) -> None:
    for linear in LINEARS:
        tensors[f"{FIRST}{linear}.weight"][3] = 0


def zero_heads(tensors: Tensors) -> None:
    """Zero the queries of a head in one layer, the keys and the values of a head in another."""
    tensors[f"{FIRST}self_attn.q_proj.weight"][:HEAD_DIM] = 0
    tensors["model.layers.1.self_attn.k_proj.weight"][:HEAD_DIM] = 0
    tensors["model.layers.1.self_attn.v_proj.weight"][HEAD_DIM:] = 0


def prune_inner(tensors: Tensors) -> None:
    """Zero half of the intermediate features, like padding."""
    for linear in ("mlp.gate_proj", "mlp.up_proj"):
        tensors[f"{FIRST}{linear}.weight"][INNER // 2 :] = 0
    tensors[f"{FIRST}mlp.down_proj.weight"][:, INNER // 2 :] = 0


def prune_block(tensors: Tensors) -> None:
    for linear in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"{FIRST}{linear}.weight"][:] = 0


def massive_activations(tensors: Tensors) -> None:
    """Make one feature of one token a thousand times as large as the others."""
    tensors[EMBEDDING][PADDING, 7] = 1000.0


ALL = slice(None)
HARMLESS: dict[str, Callable[[Tensors], None]] = {
    "zero-embedding-row": fill(EMBEDDING, PADDING, 0.0),
    "tiny-embedding-row": fill(EMBEDDING, PADDING, 1e-30),
    "constant-embedding-row": fill(EMBEDDING, PADDING, 1.0),
    "huge-embedding-row": multiply(EMBEDDING, PADDING, 1e4),
    "zero-embedding-column": fill(EMBEDDING, (ALL, 7), 0.0),
    "zero-head-row": fill("lm_head.weight", PADDING, 0.0),
    "zero-norm-gain": fill(f"{FIRST}input_layernorm.weight", 7, 0.0),
    "zero-final-norm-gain": fill("model.norm.weight", 7, 0.0),
    **{f"zero-{linear}": fill(f"{FIRST}{linear}.weight", ALL, 0.0) for linear in LINEARS},
    "zero-rows": zero_rows,
    "zero-heads": zero_heads,
    "zero-column-of-down": fill(f"{FIRST}mlp.down_proj.weight", (ALL, 3), 0.0),
    "constant-row": fill(f"{FIRST}mlp.up_proj.weight", 3, 0.1),
    "constant-matrix": fill(f"{FIRST}mlp.up_proj.weight", ALL, 0.01),
    "padded-intermediate": prune_inner,
    "identity-layer": prune_block,
    "massive-activations": massive_activations,
}
EVERYWHERE = ("zero-embedding-row", "zero-self_attn.v_proj", "identity-layer")
"""Patterns that every recipe is tested with."""


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("ordinary") / "source", tie_word_embeddings=False, **SIZES)


@pytest.fixture(scope="module")
def tokens(ordinary: Path) -> Path:
    """Write calibration tokens that begin with the padding token and contain it elsewhere."""
    found = torch.randint(6, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(3))
    found[:, 9] = found[0, 0] = PADDING
    file = ordinary.with_name("tokens.safetensors")
    save_tokens(file, found)
    return file


def changed(source: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """Copy the source with changed weights."""
    tensors = load_file(source / FILE)
    change(tensors)
    folder.mkdir()
    for file in source.iterdir():
        if file.name != FILE:
            (folder / file.name).symlink_to(file)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def quantized(source: Path, output: Path, tokens: Path, recipe: Recipe) -> Report:
    small = SMALL | {name: value for name, value in (
        ("learned_clips", LearnedClips(sequences=2, epochs=1)),
        ("distillation", Distillation(steps=2, warmup_steps=1)),
    ) if getattr(recipe, name) is not None}  # fmt: skip
    return quantize(
        source, output, recipe=recipe.model_copy(update=small), calibration=str(tokens), progress=silent, device="cpu"
    )


@pytest.fixture(scope="module")
def ordinary_kl(ordinary: Path, tokens: Path) -> Callable[[str], float]:
    """Return a function from a recipe to the KL of an ordinary model quantized with it."""

    @cache
    def found(preset: str) -> float:
        output = ordinary.with_name(preset)
        quantized(ordinary, output, tokens, RECIPES[preset])
        return divergence(ordinary, output)

    return found


CASES = [(pattern, preset) for pattern in HARMLESS for preset in STAGES]
CASES += [(pattern, preset) for pattern in EVERYWHERE for preset in RECIPES if preset not in STAGES]


@pytest.mark.parametrize(("pattern", "preset"), CASES)
def test_harmless_pattern_is_quantized_like_any_other_model(
    ordinary: Path, tokens: Path, ordinary_kl: Callable[[str], float], tmp_path: Path, pattern: str, preset: str
) -> None:
    source = changed(ordinary, tmp_path / "source", HARMLESS[pattern])
    report = quantized(source, tmp_path / "out", tokens, RECIPES[preset])
    assert all(0 <= error < 1.01 for error in report.errors.values())
    check_all_values(Checkpoint(tmp_path / "out"))
    found = divergence(source, tmp_path / "out")
    assert found < (LARGEST_KL if preset == "eight-bits" else 2 * ordinary_kl(preset) + 0.1)


@pytest.mark.parametrize("preset", STAGES)
@pytest.mark.parametrize("size", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_padding_alone_can_calibrate(tmp_path: Path, size: str, preset: str) -> None:
    source = write_source(tmp_path / "whole", architecture=size, **SIZES)
    source = changed(source, tmp_path / "source", HARMLESS["zero-embedding-row"])
    save_tokens(tmp_path / "tokens.safetensors", torch.full((4, 32), PADDING))
    quantized(source, tmp_path / "out", tmp_path / "tokens.safetensors", RECIPES[preset])
    check_all_values(Checkpoint(tmp_path / "out"))


@pytest.mark.parametrize("preset", STAGES)
@pytest.mark.parametrize("biases", ["zero", "huge-keys"])
def test_biases_of_qwen2_may_be_zero_or_hundreds(tmp_path: Path, tokens: Path, biases: str, preset: str) -> None:
    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith("k_proj.bias") and biases == "huge-keys":
                tensor.mul_(750 / tensor.norm())
            elif name.endswith("bias"):
                tensor.zero_()

    whole = write_source(tmp_path / "whole", architecture="Qwen2ForCausalLM", dtype=torch.float16, **SIZES)
    source = changed(whole, tmp_path / "source", change)
    quantized(source, tmp_path / "out", tokens, RECIPES[preset])
    check_all_values(Checkpoint(tmp_path / "out"))
    if preset == "eight-bits":  # 8-bit steps of keys that large are coarse
        assert divergence(source, tmp_path / "out") < 10 * LARGEST_KL


@pytest.mark.parametrize("preset", STAGES)
def test_activations_that_float32_cannot_square_are_refused_with_their_layer(
    ordinary: Path, tokens: Path, tmp_path: Path, preset: str
) -> None:
    source = changed(ordinary, tmp_path / "source", multiply(f"{FIRST}mlp.up_proj.weight", ALL, 1e20))
    with pytest.raises(ToolError, match=r"source: model\.layers\.[01]: values at .* reach .*e\+2\d .* at most 1e\+15"):
        quantized(source, tmp_path / "out", tokens, RECIPES[preset])
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow_their_dtype_are_refused_with_name_and_count(tmp_path: Path, tokens: Path) -> None:
    whole = write_source(tmp_path / "whole", tie_word_embeddings=False, dtype=torch.float16, **SIZES)
    source = changed(whole, tmp_path / "source", fill("lm_head.weight", 3, 60_000.0))
    with pytest.raises(
        ToolError, match=r"not written: lm_head\.weight\[3, \d+\] is -?inf, .* \(\d+ of 17408 are wrong"
    ):
        quantized(source, tmp_path / "out", tokens, PRESETS["quarot"])
    assert not (tmp_path / "out").exists()
