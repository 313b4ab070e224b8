"""A tokenizer that makes tokens beyond the model's vocabulary is refused by every command that reads text."""

from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AddedToken, AutoTokenizer

import offline
from offline.progress import silent
from tests.common.tiny import write_source
from tests.offline.cli.test_main import RECIPE, infoquant, refused
from tests.offline.evaluate.test_tasks import write_task

KNOWN = 259
"""Tokens of the tiny tokenizer; one that is added has this id."""


def source_with(folder: Path, role: str) -> Path:
    """Write a model with the tokenizer's vocabulary, then add one token to the tokenizer: a word, BOS or EOS."""
    write_source(folder, vocab_size=KNOWN, hidden_size=128, head_dim=32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if role == "word":
        tokenizer.add_tokens([AddedToken("tide")])
    else:
        tokenizer.add_special_tokens({f"{role}_token": "<extra>"})
    if role == "bos":
        begin = processors.TemplateProcessing(single="<extra> $A", special_tokens=[("<extra>", KNOWN)])
        tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["word", "bos", "eos"])
def role(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(role: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_with(tmp_path_factory.mktemp("tokens") / "source", role)


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    offline.quantize(source, source.with_name("out"), preset="rtn", progress=silent)
    return source.with_name("out")


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    file = source.with_name("text.txt")
    file.write_text("the tide had gone out further than anyone could remember " * 60)
    return file


def named(role: str) -> str:
    what = {"word": "('tide')", "bos": "('<extra>'), its BOS token,", "eos": "('<extra>'), its EOS token,"}[role]
    return f"makes token {KNOWN} {what} of it, and vocab_size in config.json is {KNOWN}"


def test_calibration_text_is_refused_with_its_name(role: str, source: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    out = tmp_path / "out"
    refused(f"{text}: the tokenizer {source}", "quantize", source, out, "--recipe", recipe, "--calibration", text)
    refused(named(role), "quantize", source, out, "--recipe", recipe, "--calibration", text)


def test_evaluation_text_is_refused(role: str, source: Path, checkpoint: Path, text: Path) -> None:
    for model in (source, checkpoint):
        refused(named(role), "eval", model, "--corpus", text, "--tokens", 64, "--window", 32)


def test_texts_of_tasks_are_refused(role: str, source: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The texts begin with a BOS if the tokenizer says so, and end with no EOS."""
    task = write_task(tmp_path, doc_to_text="tide {{question}}")
    for model in (source, checkpoint):
        if role == "eos":
            assert infoquant("eval", model, "--tasks", task).exit_code == 0
        else:
            refused(named(role), "eval", model, "--tasks", task)


def test_text_of_the_report_is_refused(role: str, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    refused(named(role), "report", checkpoint, "--corpus", text, "--output", tmp_path / "page.html")


def test_passages_of_verify_check_and_report_are_refused(
    role: str, source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """The passages end with no EOS, so only words and BOS matter."""
    commands = (
        ("verify", checkpoint, "--against", source),
        ("quantize", source, tmp_path / "out", "--preset", "rtn", "--check"),
        ("report", checkpoint, "--output", tmp_path / "page.html"),
    )
    for command in commands:
        if role == "eos":
            assert infoquant(*command).exit_code == 0
        else:
            done = infoquant(*command)
            assert done.exit_code == 1
            assert "the project's own passages: the tokenizer" in done.stderr
            assert named(role) in done.stderr


def test_sampling_starts_with_no_token_that_the_model_lacks(role: str, source: Path, tmp_path: Path) -> None:
    arguments = ("sample", source, tmp_path / "tokens.safetensors", "--sequences", 1, "--length", 8)
    if role == "bos":
        refused(named(role), *arguments)
    else:
        assert infoquant(*arguments).exit_code == 0
