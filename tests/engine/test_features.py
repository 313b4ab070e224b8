"""What vLLM does beside plain decoding leaves answers as they are, or is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offline import PRESETS, quantize
from offline.progress import silent
from tests.common.engine import Answer, Engine, EngineError, Run, running_engine
from tests.common.tiny import SIZES, VOCAB_SIZE, write_source
from tests.offline.model.test_architectures import SMALL

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = torch.randint(3, VOCAB_SIZE - 13, (4, 24), generator=GENERATOR).repeat(1, 5).tolist()
SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def quantized(folder: Path, size: str, seed: int = 0) -> Path:
    recipe = PRESETS["fast"].model_copy(update=SMALL | {"lm_head_bits": 8})
    source = write_source(folder / "source", seed=seed, **SIZES[size])
    quantize(source, folder / "checkpoint", recipe=recipe, progress=silent)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model, whose vocabulary has 8 bits."""
    return quantized(tmp_path_factory.mktemp("tied"), "tied")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same class and sizes, other weights."""
    return quantized(tmp_path_factory.mktemp("other"), "tied", seed=1)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a sliding window of 24 tokens."""
    return quantized(tmp_path_factory.mktemp("windowed"), "mistral-window")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a sliding window of 24 tokens on its first layer alone: vLLM keeps two groups of caches."""
    return quantized(tmp_path_factory.mktemp("mixed"), "ministral")


@pytest.fixture(scope="module")
def cache_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which the cache alone is quantized."""
    folder = tmp_path_factory.mktemp("cache")
    recipe = PRESETS["kv4"].model_copy(update={"calibration": SMALL["calibration"]})
    quantize(write_source(folder / "source"), folder / "checkpoint", recipe=recipe, progress=silent)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def plain(engine: Engine, checkpoint: Path) -> list[Answer]:
    return run(engine, checkpoint, PROMPTS).answers[0]


def run(engine: Engine, checkpoint: Path, *batches: list[list[int]], **options: Any) -> Run:
    return engine.run(checkpoint, *batches, max_tokens=24, enable_prefix_caching=False, **options)


def assert_equal(found: list[Answer], expected: list[Answer]) -> None:
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    values = [torch.tensor([answer.prompt + answer.logprobs for answer in answers]) for answers in (found, expected)]
    torch.testing.assert_close(*values, rtol=0, atol=1e-4)


def test_drafts_out_of_the_prompt_change_no_answer(checkpoint: Path, plain: list[Answer]) -> None:
    with running_engine() as own:  # what vLLM imports for drafts keeps it from starting again in the same process
        drafted = run(own, checkpoint, PROMPTS, speculative_config=SPECULATION)
    accepted, drafts = (drafted.counters[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("accepted", "draft"))
    assert 0 < accepted < drafts
    assert_equal(drafted.answers[0], plain)


@pytest.mark.parametrize("kind", ["checkpoint", "windowed", "mixed", "cache_alone"])
def test_a_cached_prefix_changes_no_answer(engine: Engine, kind: str, request: pytest.FixtureRequest) -> None:
    options = {"enable_prefix_caching": True, "block_size": 32, "of_prompts": False, "max_tokens": 24}
    first, second = engine.run(request.getfixturevalue(kind), PROMPTS, PROMPTS, **options).answers
    assert not any(answer.cached for answer in first)
    assert all(answer.cached >= 64 for answer in second)
    assert_equal(second, first)


@pytest.mark.parametrize(("kind", "blocks"), [("checkpoint", 18), ("windowed", 8), ("mixed", 14)])
def test_preempted_requests_answer_as_others(
    engine: Engine, kind: str, blocks: int, request: pytest.FixtureRequest
) -> None:
    checkpoint, options = request.getfixturevalue(kind), {"block_size": 32, "of_prompts": False, "max_model_len": 160}
    plain = run(engine, checkpoint, PROMPTS, **options).answers[0]
    found = run(engine, checkpoint, PROMPTS, num_gpu_blocks_override=blocks, **options)
    assert found.counters["vllm:num_preemptions"] > 0
    assert_equal(found.answers[0], plain)


def test_a_class_that_ignores_windows_of_single_layers_is_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path, "qwen3-windows")
    config = checkpoint / "config.json"
    config.write_text(config.read_text().replace('"max_window_layers": 1', '"max_window_layers": 2'))
    with pytest.raises(EngineError, match=r"layers\.1\.self_attn\.attn: .* window of None .* 24 .*--model-impl transf"):
        run(engine, checkpoint, PROMPTS)


@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_a_prefix_hit_at_a_block_border_changes_no_answer(engine: Engine, checkpoint: Path, block_size: int) -> None:
    generator = torch.Generator().manual_seed(block_size)
    first, *others = torch.randint(3, VOCAB_SIZE - 13, (4, 280), generator=generator).tolist()
    shared = (block_size - 1, block_size, block_size + 1)
    prompts = [first[:count] + other[count:] for count, other in zip(shared, others, strict=True)]
    options = {"block_size": block_size, "of_prompts": False, "max_tokens": 8}
    plain = engine.run(checkpoint, prompts, enable_prefix_caching=False, **options).answers[0]
    found = engine.run(checkpoint, [first], prompts, enable_prefix_caching=True, **options).answers[1]
    assert [answer.cached for answer in found] == [0, block_size, block_size]
    assert_equal(found, plain)


def test_a_prompt_of_33000_tokens_has_the_same_answer_in_any_chunks(engine: Engine, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 256}
    source = write_source(tmp_path / "source", max_position_embeddings=34_000, **sizes)
    quantize(source, tmp_path / "out", recipe=PRESETS["rtn"], progress=silent)
    prompt = torch.randint(3, VOCAB_SIZE - 13, (33_000,), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"max_model_len": 33_100, "of_prompts": False, "max_tokens": 8, "enable_prefix_caching": False}
    small, large = (
        engine.run(tmp_path / "out", [prompt], max_num_batched_tokens=tokens, **options).answers[0]
        for tokens in (4096, 33_100)
    )
    assert_equal(small, large)


def test_reloaded_weights_answer_as_those_that_were_loaded_at_first(
    engine: Engine, checkpoint: Path, other: Path, plain: list[Answer]
) -> None:
    before, after = run(
        engine, other, PROMPTS, PROMPTS, calls=[("reload_weights", {"weights_path": str(checkpoint)})]
    ).answers
    assert [answer.prompt for answer in before] != [answer.prompt for answer in plain]
    assert_equal(after, plain)


def test_the_transformers_backend_answers_as_the_class_of_vllm(
    engine: Engine, checkpoint: Path, plain: list[Answer]
) -> None:
    found = run(engine, checkpoint, PROMPTS, model_impl="transformers").answers[0]
    values = [torch.tensor([answer.prompt for answer in answers]) for answers in (found, plain)]
    difference = (values[0] - values[1]).abs()  # RoPE is transformers' own, whose last bits flip a code now and then
    assert difference.median() <= 1e-4
    assert difference.mean() <= 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_sleep_mode": True}, "Sleep mode is not supported on current platform"),
        ({"kv_cache_dtype": "fp8"}, "kv cache dtype fp8: not served with a quantized KV cache"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    engine: Engine, checkpoint: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        run(engine, checkpoint, PROMPTS, **options)
