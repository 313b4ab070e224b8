"""Figures of `evaluate` follow their definitions, with standard errors over windows."""

import math
from pathlib import Path

import pytest
import torch

import offline
from offline.errors import ToolError
from offline.evaluate.metrics import compare, evaluate
from offline.model.source import Source
from tests.common.tiny import VOCAB_SIZE, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("evaluate") / "source")


@pytest.fixture(scope="module")
def corpus(source: Path) -> str:
    file = source.with_name("corpus.txt")
    file.write_text("".join(f"sentence {number} of many. " for number in range(500)))
    return str(file)


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> str:
    recipe = offline.Recipe(name="hadamard-rtn", transform="hadamard", rounding="rtn")
    offline.quantize(source, source.with_name("checkpoint"), recipe=recipe, progress=lambda *_: None)
    return str(source.with_name("checkpoint"))


@torch.no_grad()
def test_figures_follow_their_definitions(source: Path, tmp_path: Path) -> None:
    model = Source.open(write_source(tmp_path / "other", seed=1)).model(torch.float32)
    reference = Source.open(source).model(torch.float32)
    windows = torch.randint(3, VOCAB_SIZE, (5, 16), generator=torch.Generator().manual_seed(0))
    found = compare(list(windows), model, reference)
    p, q = (m(windows).logits.double()[:, :-1].softmax(-1) for m in (reference, model))
    nll = -q.gather(-1, windows[:, 1:, None]).log().mean((1, 2))
    kl = (p * (p.log() - q.log())).sum(-1).mean(1)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    assert found["perplexity"].mean == pytest.approx(nll.mean().exp().item(), rel=1e-4)
    assert found["perplexity"].standard_error == pytest.approx(
        (nll.mean().exp() * nll.std() / math.sqrt(5)).item(), rel=1e-3
    )
    assert found["kl"].mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found["kl"].standard_error == pytest.approx((kl.std() / math.sqrt(5)).item(), rel=1e-3)
    assert found["top1_agreement"].mean == pytest.approx(agreement.mean().item())


def test_model_against_itself_has_no_divergence(source: Path, corpus: str) -> None:
    found = evaluate(str(source), reference=str(source), corpus=corpus, tokens=256, window=64)
    assert found.kl is not None
    assert found.kl.mean == 0
    assert found.top1_agreement is not None
    assert found.top1_agreement.mean == 1
    assert found.perplexity == found.reference_perplexity
    assert (found.windows, found.window, found.simulated, found.text) == (4, 64, False, corpus)


def test_checkpoint_is_simulated(source: Path, corpus: str, checkpoint: str) -> None:
    found = evaluate(checkpoint, reference=str(source), corpus=corpus, tokens=256, window=64)
    assert found.simulated
    assert found.kl is not None
    assert 0 < found.kl.mean < 2


def test_text_is_sampled_where_none_is_given(source: Path, checkpoint: str) -> None:
    found = evaluate(checkpoint, reference=str(source), tokens=64, window=32)
    assert found.text == "sampled from source, seed 0"


def test_one_window_has_no_standard_error(source: Path, corpus: str) -> None:
    assert evaluate(str(source), corpus=corpus, tokens=64, window=64).perplexity.standard_error is None


def test_checkpoint_without_text_or_reference_is_refused(checkpoint: str) -> None:
    with pytest.raises(ToolError, match="nothing to evaluate on; give --corpus FILE, or --reference"):
        evaluate(checkpoint)


def test_reference_with_another_vocabulary_is_refused(corpus: str, checkpoint: str, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", vocab_size=300)
    with pytest.raises(ToolError, match="vocabulary of 300 tokens, the model has 272"):
        evaluate(checkpoint, reference=str(other), corpus=corpus, tokens=64, window=32)


def test_fewer_tokens_than_a_window_are_refused(source: Path, corpus: str) -> None:
    with pytest.raises(ToolError, match="100 tokens make no window of 512"):
        evaluate(str(source), corpus=corpus, tokens=100, window=512)
