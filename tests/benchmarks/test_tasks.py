"""Items of tasks are cut, scored and drawn as lm-eval cuts and scores them, and alike for every model."""

import json
import math
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from benchmarks.accuracy import tasks
from benchmarks.accuracy.tasks import Answer, Item, bits_per_byte, encode, is_right, read_task
from offline.errors import ToolError
from offline.model.source import read_tokenizer
from tests.common.tiny import write_source

QUESTION = Item(context="2 + 2 =", choices=[" four", " 4", " vier", " fourteen"], label=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return read_tokenizer(write_source(tmp_path_factory.mktemp("tasks") / "source"))


def write_items(file: Path, count: int = 30, choices: int = 2) -> Path:
    lines = [
        {"id": n, "context": f"question {n}:", "choices": [f" {n}{c}" for c in range(choices)], "label": 0}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_accuracy_compares_sums_and_normed_accuracy_sums_per_byte() -> None:
    given = Answer([-6.0, -5.0, -5.5, -8.0], [False] * 4)  # per byte: -1.2, -2.5, -1.1, -0.89
    assert is_right(QUESTION, given, "acc") == 0
    assert is_right(QUESTION, given, "acc_norm") == 1
    assert is_right(QUESTION.model_copy(update={"label": 1}), given, "acc") == 1


def test_bytes_are_counted_and_not_characters() -> None:
    item = Item(context="?", choices=[" a", " ä"], label=1)  # 2 and 3 bytes, both of 2 characters
    assert is_right(item, Answer([-2.0, -2.7], [False] * 2), "acc_norm") == 1
    assert bits_per_byte(item, Answer([-2.0, -3 * math.log(2)], [False] * 2)) == pytest.approx(1.0)


def test_the_first_of_equal_choices_counts() -> None:
    assert is_right(QUESTION.model_copy(update={"label": 1}), Answer([-3.0, -2.0, -2.0, -2.0], [True] * 4), "acc") == 1


def test_greedy_accuracy_asks_for_the_likeliest_token_everywhere() -> None:
    prompt = tasks.Prompt([7, 8, 9, 10], start=2)
    second, likeliest = {9: (-0.5, 1)}, {10: (-1.5, 1)}
    reply = [{8: (-9.0, 5), 3: (-0.1, 1)}, second, likeliest]
    assert tasks._answer([prompt], [reply]) == Answer([-2.0], [True])
    reply[2] = {10: (-1.5, 2), 4: (-0.2, 1)}
    assert tasks._answer([prompt], [reply]) == Answer([-2.0], [False])
    item = Item(context="a", choices=[" b"], label=0)
    assert is_right(item, Answer([-2.0], [False]), "greedy") == 0


def test_trailing_spaces_of_a_context_belong_to_the_choice(tokenizer: PreTrainedTokenizerBase) -> None:
    plain, spaced = encode(tokenizer, "so", "  it is"), encode(tokenizer, "so  ", "it is")
    assert plain == spaced
    assert (plain.start, len(plain.ids)) == (2, 9)  # every byte is a token


def test_every_model_gets_the_same_items_and_another_seed_draws_others(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = write_items(tmp_path / "sciq.jsonl")
    first, again, other = (read_task(file, tokenizer, 10, seed).items for seed in (0, 0, 1))
    assert first == again
    assert len(first) == 10
    assert first != other
    assert first == sorted(first, key=lambda item: int(item.context.split()[1].strip(":")))  # in the file's order


def test_metrics_are_those_of_the_tasks(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    metrics = {
        name: read_task(write_items(tmp_path / f"{name}.jsonl", choices=choices), tokenizer, 5, 0).metric
        for name, choices in (("sciq", 4), ("arc_easy", 4), ("piqa", 2), ("lambada", 1), ("own", 3))
    }
    expected = {"sciq": "acc", "arc_easy": "acc", "piqa": "acc_norm", "lambada": "greedy", "own": "acc_norm"}
    assert metrics == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a", "choices": ["b"], "label": 1}', "label 1 of 1 choices"),
        ('{"context": " ", "choices": ["b"], "label": 0}', "context"),
        ('{"context": "a", "choices": ["b", ""], "label": 0}', "none of which may be empty"),
        ("{", "not JSON"),
    ],
)
def test_a_line_that_is_no_item_is_named(
    line: str, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = write_items(tmp_path / "items.jsonl", count=3)
    with file.open("a") as opened:
        opened.write(line + "\n")
    with pytest.raises(ToolError, match=rf"items\.jsonl:4.*{message}"):
        read_task(file, tokenizer, 10, 0)


def test_a_single_item_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="1 items found, 5 asked for; a standard error needs 2"):
        read_task(write_items(tmp_path / "items.jsonl", count=1), tokenizer, 5, 0)
