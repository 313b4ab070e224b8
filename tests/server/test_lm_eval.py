"""The own scorer of tasks says what lm-eval says, on 50 items; only where lm-eval is installed."""

import json
import random
from pathlib import Path

import pytest

from benchmarks.accuracy.lm_eval_check import TOLERANCE, compare
from benchmarks.accuracy.tasks import read_task
from benchmarks.common.models import language_reference
from offline.model.source import read_tokenizer

pytest.importorskip("lm_eval")

CONTEXT_WORDS, CHOICE_WORDS = 20, 6


def passages() -> list[list[str]]:
    """Words of paragraphs that are long enough to be cut into a question and its answer."""
    paragraphs = [paragraph.split() for paragraph in language_reference().read_text().split("\n\n")]
    return [words for words in paragraphs if len(words) >= CONTEXT_WORDS + CHOICE_WORDS]


def write_task(file: Path, items: int, choices: int, spaced: bool = False) -> Path:
    """Which of the ends continues the passage? `spaced` leaves the space before them to the context."""
    drawn = random.Random(file.stem).sample(passages(), items * choices)
    lines = []
    for number in range(items):
        first, *others = drawn[number * choices : (number + 1) * choices]
        ends = [" ".join(words[CONTEXT_WORDS:][: CHOICE_WORDS + at]) for at, words in enumerate([first, *others])]
        context, lead = " ".join(first[:CONTEXT_WORDS]), "" if spaced else " "
        lines.append(
            {
                "context": context + " " * spaced,
                "choices": [lead + end for end in ends[1:] + ends[:1]],
                "label": choices - 1,
            }
        )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_scores_are_those_of_lm_eval(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(smollm2)
    files = [
        write_task(tmp_path / "sciq.jsonl", items=15, choices=4),  # by sums
        write_task(tmp_path / "normed.jsonl", items=15, choices=3),  # by sums per byte
        write_task(tmp_path / "spaced.jsonl", items=10, choices=3, spaced=True),
        write_task(tmp_path / "greedy.jsonl", items=10, choices=1),
    ]
    tasks = [read_task(file, tokenizer, 50, 0) for file in files]
    assert [task.metric for task in tasks] == ["acc", "acc_norm", "acc_norm", "greedy"]
    assert sum(len(task.items) for task in tasks) == 50
    for found in compare(smollm2, tasks):
        print(f"{found.task.name}: largest difference {found.largest:.2g} nats, {found.verdicts} verdicts differ")
        assert found.largest <= TOLERANCE
        assert found.verdicts == 0
