"""Every model class of the table, run by vLLM, says what the simulation says, of prompts and of what it generates.

On tiny random models in float32; see server/test_equality.py. Prompts come in chunks, while which a sliding window
gives blocks of the cache back. Between them they have the codes of `fast` and of `best`, layers that differ, and caches
with several pairs of bits for keys and values. A last bit may flip a code that was all but a tie, and so change the
rest of a window: most positions must be equal, and the few behind such a code near.
"""

from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.scores import Scores, kl_divergence
from offline import PRESETS, quantize
from offline.evaluate.simulate import load_simulated
from offline.progress import silent
from offline.recipe import CalibrationSize, Distillation, Psot, Recipe
from tests.common.engine import Engine
from tests.common.tiny import FAMILIES, MIXTURES, SIZES, VOCAB_SIZE, write_source
from tests.offline.test_layers import MIXED
from tests.server.test_equality import scores_of

CHUNKS = {"block_size": 32, "max_num_batched_tokens": 64}
SMALL = {"calibration": CalibrationSize(sequences=16, sequence_length=128), "psot": Psot(steps=3)}
ROUNDED_AS = {"mistral": ("best", 4, 4), "qwen2": ("fast", 8, 4), "qwen3": ("best", 4, 8), "qwen3-moe": ("best", 4, 4)}
"""By family: preset, bits of keys, of values; else those of `fast`."""
MODEL_IMPL = {"qwen3-windows": "transformers"}
"""By family: the implementation that a user has to choose; else vLLM chooses."""
OTHER_BITS = ("ministral",)
"""Families that vLLM serves by transformers' modules, whose last bits differ: codes may flip early in a window."""
CACHE_ALONE = ("llama3-rope", "mistral-window", "phi3", "qwen2", "qwen3", "smollm3", "gemma3")
"""Families whose cache alone is quantized too."""
LAYERS_DIFFER = ("tied", "phi3", "qwen3-moe")
"""Families whose two layers have different formats: weights of 8 bits, inputs of 4, 8 and 16."""
CASES = [(size, None) for size in FAMILIES] + [(size, "kv4") for size in CACHE_ALONE]
CASES += [(size, "layers") for size in LAYERS_DIFFER]


def recipe_for(family: str, preset: str | None) -> Recipe:
    other, key_bits, value_bits = ROUNDED_AS.get(family, ("fast", 4, 4))
    if preset == "layers":
        return PRESETS["fast"].model_copy(update=SMALL | {"layers": MIXED})
    recipe = PRESETS[preset or other]
    assert recipe.kv_cache is not None
    cache = recipe.kv_cache.model_copy(update={"key_bits": key_bits, "value_bits": value_bits})
    whole = recipe.distillation is not None and family not in MIXTURES  # stages that train the model as a whole
    steps, rounding = Distillation(steps=2) if whole else None, recipe.gptq.model_copy(update={"guided": whole})
    return recipe.model_copy(update=SMALL | {"kv_cache": cache, "distillation": steps, "gptq": rounding})


@pytest.mark.parametrize(("size", "preset"), CASES)
def test_served_is_what_the_simulation_computes(size: str, preset: str | None, engine: Engine, tmp_path: Path) -> None:
    checkpoint, recipe = tmp_path / "checkpoint", recipe_for(size, preset)
    quantize(write_source(tmp_path / "source", **SIZES[size]), checkpoint, recipe=recipe, progress=silent)
    prompts = torch.randint(3, VOCAB_SIZE - 13, (4, 240), generator=torch.Generator().manual_seed(3)).tolist()
    options = CHUNKS | {"model_impl": MODEL_IMPL.get(size, "auto")}
    (answers,) = engine.run(checkpoint, prompts, max_tokens=16, top=VOCAB_SIZE, **options).answers
    served = Scores(
        -torch.tensor([answer.prompt + answer.logprobs for answer in answers], dtype=torch.float64),
        [answer.likeliest for answer in answers],
    )
    windows = torch.tensor([prompt + answer.tokens for prompt, answer in zip(prompts, answers, strict=True)])
    model = load_simulated(checkpoint, torch.float32)
    with torch.no_grad():
        simulated = scores_of(model(windows[:, :-1]).logits.double(), windows)
    difference = (simulated.nll - served.nll).abs()
    divergence = float(kl_divergence(simulated, served).mean())
    print(f"|difference of NLL| median {difference.median():.1e}, mean {difference.mean():.5f}, KL {divergence:.5f}")
    if size not in OTHER_BITS:
        assert difference.median() <= 1e-4
    assert difference.mean() <= 0.05
    assert divergence <= 0.01
