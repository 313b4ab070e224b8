"""Embeddings and scores that vLLM serves from a checkpoint are those of its source; a draft model changes no answer."""

import json
from pathlib import Path

import pytest
import torch

from infoquant_vllm.format import MODULES_FILE, WeightArgs
from offline import PRESETS, quantize
from offline.formats import Site, SiteActivations, Sites
from offline.model.source import Source
from offline.progress import silent
from offline.recipe import KVCache
from tests.common.engine import Engine, EngineError, running_engine
from tests.common.tiny import SIZES, VOCAB_SIZE, write_source
from tests.offline.model.test_architectures import SMALL

PROMPTS = torch.randint(3, VOCAB_SIZE - 13, (4, 24), generator=torch.Generator().manual_seed(0))
SMALLEST_COSINE = 0.998
"""Mean, to the source's embeddings; those in another basis have 0."""
LARGEST_SCORE_ERROR = 0.2  # relative; scores in another basis have 1.4
HIGH = Site(weights=WeightArgs(num_bits=8), input_activations=SiteActivations(num_bits=16))
PRECISE = {
    "sites": Sites(qkv=HIGH, o=HIGH, gate_up=HIGH, down=HIGH),
    "kv_cache": KVCache(key_bits=8, value_bits=8, key_clip_ratio=1.0, value_clip_ratio=1.0),
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
TOKENS = ["a", "b"]
RERANKER = {
    "architectures": ["LlamaForSequenceClassification"],
    "classifier_from_token": TOKENS,
    "method": "from_2_way_softmax",
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source that Sentence Transformers would pool by means, and its checkpoint."""
    folder = tmp_path_factory.mktemp("untied")
    source = write_source(folder / "source", **SIZES["untied"])
    (source / MODULES_FILE).write_text(json.dumps(MODULES))
    for module in ("1_Pooling", "2_Normalize"):
        (source / module).mkdir()
    (source / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    recipe = PRESETS["fast"].model_copy(update=SMALL | PRECISE)
    quantize(source, folder / "checkpoint", recipe=recipe, progress=silent)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and its checkpoint, whose vocabulary has 8 bits."""
    folder = tmp_path_factory.mktemp("tied")
    recipe = PRESETS["fast"].model_copy(update=SMALL | PRECISE | {"lm_head_bits": 8})
    quantize(write_source(folder / "source", **SIZES["tied"]), folder / "checkpoint", recipe=recipe, progress=silent)
    return folder


@torch.no_grad()
def hidden_states(source: Path) -> torch.Tensor:
    """What the source's final norm puts out, [prompts, tokens, hidden]."""
    return Source.open(source).model(torch.float32).model(PROMPTS).last_hidden_state


def assert_close(found: list[list[float]] | torch.Tensor, expected: torch.Tensor) -> None:
    cosines = torch.nn.functional.cosine_similarity(torch.as_tensor(found), expected, dim=-1)
    print(f"cosine to the source's {cosines.mean():.5f} on average, {cosines.min():.5f} at least")
    assert cosines.mean() >= SMALLEST_COSINE


def test_embeddings_are_the_sources_pooled_as_its_modules_say(engine: Engine, untied: Path) -> None:
    found = engine.pool(untied / "checkpoint", PROMPTS.tolist(), "embed", runner="auto")
    assert_close(found, hidden_states(untied / "source").mean(1))


def test_embeddings_of_tokens_are_the_sources_in_a_tied_model(engine: Engine, tied: Path) -> None:
    found = engine.pool(
        tied / "checkpoint", PROMPTS.tolist(), "token_embed", convert="embed", pooler_config={"task": "token_embed"}
    )
    assert_close(torch.tensor(found), hidden_states(tied / "source"))


def test_scores_out_of_rows_of_lm_head_are_the_sources(engine: Engine, untied: Path) -> None:
    pooler = {"seq_pooling_type": "LAST", "use_activation": False}
    found = engine.pool(
        untied / "checkpoint",
        PROMPTS.tolist(),
        "classify",
        convert="classify",
        hf_overrides=RERANKER,
        pooler_config=pooler,
    )
    source = Source.open(untied / "source")
    no, yes = source.tensor("lm_head.weight")[source.tokenizer().convert_tokens_to_ids(TOKENS)]
    expected = hidden_states(untied / "source")[:, -1] @ (yes - no)
    error = (torch.tensor(found).squeeze(-1) - expected).norm() / expected.norm()
    print(f"relative error of scores {error:.3f}")
    assert error <= LARGEST_SCORE_ERROR


def test_a_door_that_is_not_served_stops_the_start(engine: Engine, tied: Path) -> None:
    with pytest.raises(EngineError, match="--enable-prompt-embeds is not served"):
        engine.run(tied / "checkpoint", PROMPTS.tolist(), enable_prompt_embeds=True)


def test_another_model_as_a_draft_changes_no_answer(engine: Engine, untied: Path, tied: Path) -> None:
    alone = engine.run(untied / "checkpoint", PROMPTS.tolist(), max_tokens=16, runner="generate")
    speculation = {"method": "draft_model", "model": str(tied / "checkpoint"), "num_speculative_tokens": 2}
    with running_engine() as own:  # what vLLM imports for drafts keeps it from starting again in the same process
        drafted = own.run(
            untied / "checkpoint", PROMPTS.tolist(), max_tokens=16, runner="generate", speculative_config=speculation
        )
    assert drafted.counters["vllm:spec_decode_num_draft_tokens"] > 0
    for found, expected in zip(drafted.answers[0], alone.answers[0], strict=True):
        assert found.tokens == expected.tokens
        torch.testing.assert_close(
            torch.tensor(found.prompt + found.logprobs),
            torch.tensor(expected.prompt + expected.logprobs),
            rtol=0,
            atol=1e-4,
        )
