"""`vllm serve --load-format dummy` answers from a config.json alone, whatever the recipe."""

import math
from pathlib import Path

import pytest
from transformers import LlamaConfig

from benchmarks.shapes import write_config
from offline.presets import PRESETS
from offline.recipe import Recipe
from tests.common.engine import Engine, EngineError

VOCAB = 64
RECIPES = {
    "fast, 80 layers": PRESETS["fast"],
    "best, 8-bit vocabulary": PRESETS["best"].model_copy(update={"lm_head_bits": 8}),
    "paper": PRESETS["paper"],
    "kv4": PRESETS["kv4"],
}


def write(folder: Path, recipe: Recipe | None, layers: int = 2, tied: bool = True) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    names = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied, "vocab_size": VOCAB}
    write_config(LlamaConfig(num_hidden_layers=layers, **names, **sizes).to_dict(), folder, recipe)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_a_config_alone_answers_in_finite_numbers(name: str, tied: bool, engine: Engine, tmp_path: Path) -> None:
    folder = write(tmp_path / "shape", RECIPES[name], 80 if "80" in name else 2, tied)
    prompts = [list(range(2, 62)), [7, 7, 7]]
    run = engine.run(folder, prompts, max_tokens=3, top=VOCAB, dtype="bfloat16", load_format="dummy")
    for answer in run.answers[0]:
        values = [logprob for place in answer.likeliest for logprob in place.values()]
        assert len(values) >= VOCAB * 5
        assert all(map(math.isfinite, values))


def test_without_the_flag_a_config_alone_is_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    folder = write(tmp_path / "shape", PRESETS["fast"])
    with pytest.raises(EngineError, match=r"shape: holds no weights .* or pass --load-format dummy"):
        engine.run(folder, [[3, 4]])
