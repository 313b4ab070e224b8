"""vLLM serves turned LoRA adapters beside a quantized model as the source that they are merged into, and no others."""

from pathlib import Path

import pytest
import torch

from infoquant_vllm.format import FormatError
from offline import PRESETS, Recipe, quantize
from offline.lora import turn_adapter
from offline.model.reference import load_reference
from offline.progress import silent
from offline.recipe import KVCache, PsotLayer
from tests.common.eight_bits import EIGHT_BITS
from tests.common.engine import Answer, Engine
from tests.common.tiny import SIZES, VOCAB_SIZE, merge, write_adapter, write_source
from tests.offline.model.test_architectures import SMALL

PROMPTS = torch.randint(3, VOCAB_SIZE - 13, (3, 48), generator=torch.Generator().manual_seed(0)).tolist()
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
FAST = PRESETS["fast"].model_copy(update=SMALL | {"lm_head_bits": 8})
CACHE = KVCache(key_bits=8, value_bits=8, key_clip_ratio=1.0, value_clip_ratio=1.0)
RECIPES = {
    "eight-bits": EIGHT_BITS,
    "per layer": EIGHT_BITS.model_copy(
        update={"transform": "psot-layer", "equalize": False, "psot_layer": PsotLayer(epochs=1)}
    ),
    "cache alone": Recipe(name="cache", transform="heads", rounding="none", kv_cache=CACHE),
    "fast": FAST,
}
SERVED = ["tied", "untied-biases", "no-gqa", "mistral", "granite", "phi3", "qwen2", "qwen3", "gemma3"]
CASES = [("eight-bits", size) for size in SERVED] + [("per layer", "untied"), ("cache alone", "tied")]


def prepare(folder: Path, size: str, recipe: str, adapters: int = 1) -> tuple[Path, Path, list[Path], list[Path]]:
    """A source, its checkpoint, and adapters as they are given and turned."""
    source, checkpoint = write_source(folder / "source", **SIZES[size]), folder / "checkpoint"
    quantize(source, checkpoint, recipe=RECIPES[recipe], progress=silent)
    given = [write_adapter(folder / f"given-{seed}", source, seed) for seed in range(adapters)]
    turned = [folder / f"turned-{seed}" for seed in range(adapters)]
    for one, output in zip(given, turned, strict=True):
        turn_adapter(checkpoint, one, output)
    return source, checkpoint, given, turned


def logprobs(source: Path, prompt: list[int]) -> torch.Tensor:
    """What the source says of the tokens of a prompt but the first."""
    tokens = torch.tensor([prompt])
    scores = load_reference(source, torch.float32)(tokens).logits.log_softmax(-1)
    return scores[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]


def told(answers: list[Answer]) -> torch.Tensor:
    return torch.tensor([answer.prompt for answer in answers])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found - expected).abs().mean().item()


@pytest.mark.parametrize(("recipe", "size"), CASES)
def test_a_turned_adapter_answers_as_the_source_that_it_is_merged_into(
    engine: Engine, tmp_path: Path, recipe: str, size: str
) -> None:
    source, checkpoint, (given,), (turned,) = prepare(tmp_path, size, recipe)
    merged, prompt = merge(source, given, tmp_path / "merged"), PROMPTS[0]
    plain, adapted = told(engine.run(checkpoint, [prompt] * 2, adapters=[None, turned], **LORA).answers[0])
    without, expected = logprobs(source, prompt), logprobs(merged, prompt)
    print(f"{size}: error {error(plain, without):.4f} without and {error(adapted, expected):.4f} with an adapter")
    assert error(expected, without) > 0.5
    assert error(plain, without) < 0.1
    assert error(adapted, expected) < 3 * error(plain, without)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Path], list[Path]]:
    """A tied model at W4A4KV4 with an 8-bit vocabulary, and two adapters."""
    return prepare(tmp_path_factory.mktemp("fast"), "tied", "fast", adapters=2)


def test_requests_with_two_adapters_and_none_answer_together_as_each_alone(
    engine: Engine, served: tuple[Path, Path, list[Path], list[Path]], tmp_path: Path
) -> None:
    source, checkpoint, given, turned = served
    prompt, asked = PROMPTS[0], [None, *turned, turned[0]]
    together = told(engine.run(checkpoint, [prompt] * 4, adapters=asked, **LORA).answers[0])
    alone = [told(engine.run(checkpoint, [prompt], adapters=[one], **LORA).answers[0])[0] for one in asked]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-4)
    plain = told(engine.run(checkpoint, [prompt]).answers[0])[0]
    torch.testing.assert_close(alone[0], plain, rtol=0, atol=0)
    merged = [merge(source, one, tmp_path / one.name) for one in given]
    lost = error(plain, logprobs(source, prompt))
    for found, folder in zip(together[1:3], merged, strict=True):
        print(f"error {lost:.3f} without and {error(found, logprobs(folder, prompt)):.3f} with an adapter")
        assert error(found, logprobs(folder, prompt)) < 2 * lost < error(found, plain)


def test_an_adapter_that_is_not_turned_is_refused_by_name(
    engine: Engine, served: tuple[Path, Path, list[Path], list[Path]]
) -> None:
    with pytest.raises(FormatError, match=r"model.layers.0.* is in the basis of the source model.*infoquant lora"):
        engine.run(served[1], PROMPTS, adapters=[served[2][0]] * 3, **LORA)


def test_an_adapter_that_was_turned_for_another_checkpoint_is_refused_by_name(
    engine: Engine, served: tuple[Path, Path, list[Path], list[Path]], tmp_path: Path
) -> None:
    source, adapter = served[0], served[2][0]
    quantize(source, tmp_path / "other", recipe=FAST, seed=1, progress=silent)
    turn_adapter(tmp_path / "other", adapter, tmp_path / "turned")
    with pytest.raises(FormatError, match=r"was turned for the basis [0-9a-f]{16}, this checkpoint has [0-9a-f]{16}"):
        engine.run(served[1], PROMPTS, adapters=[tmp_path / "turned"] * 3, **LORA)


def test_vllm_refuses_a_turned_adapter_on_the_source_by_name(
    engine: Engine, served: tuple[Path, Path, list[Path], list[Path]]
) -> None:
    with pytest.raises(ValueError, match=r"expected target modules .* received .*\.infoquant_[0-9a-f]{16}"):
        engine.run(served[0], PROMPTS, adapters=[served[3][0]] * 3, **LORA)


def test_weights_are_not_reloaded_under_adapters_that_stay(
    engine: Engine, served: tuple[Path, Path, list[Path], list[Path]]
) -> None:
    reload = ("reload_weights", {"weights_path": str(served[1])})
    with pytest.raises(FormatError, match=r"reload_weights is not served here: .*adapters"):
        engine.run(served[1], PROMPTS, PROMPTS, calls=[reload], **LORA)
