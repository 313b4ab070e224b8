"""Tasks of JSONL files: lm-eval's figures on a tiny model are their definitions, and each model gets the same items."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy.tasks import Task, TaskScores, evaluate, read_task
from offline.errors import ToolError
from offline.model.source import Source
from tests.common.tiny import write_source

METRICS = {"sciq": "acc", "piqa": "acc_bytes", "lambada": "exact_match"}


def write_items(file: Path, count: int = 40, choices: int = 2) -> Path:
    lines = [
        {
            "id": n,
            "context": f"question {n}:" + " " * (n % 2),
            "choices": [f" {n}{'äbc'[c] * (c + 1)}" for c in range(choices)],
            "label": n % choices,
        }
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@torch.inference_mode()
def write_last_words(file: Path, source: Path, count: int = 40) -> Path:
    """Write contexts with one choice: greedy decoding's next token where that is a letter, else " x"."""
    model, tokenizer = Source.open(source).model(torch.float32), Source.open(source).tokenizer()
    lines = []
    for n in range(count):
        context = f"question {n}:"
        logits = model(torch.tensor([tokenizer(context).input_ids])).logits[0, -1]
        word = tokenizer.decode([int(logits.argmax())])
        lines.append({"context": context, "choices": [word if word.isascii() and word.isalpha() else " x"], "label": 0})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def read_all(folder: Path, source: Path, count: int) -> list[Task]:
    files = [write_items(folder / "sciq.jsonl", choices=3), write_items(folder / "piqa.jsonl", choices=2)]
    return [read_task(file, count, 0) for file in (*files, write_last_words(folder / "lambada.jsonl", source))]


def items(task: Task) -> list[dict[str, Any]]:
    lines = task.file.read_text().splitlines()
    return [json.loads(lines[number]) for number in task.items]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("tasks") / "source")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, source: Path) -> list[Task]:
    return read_all(tmp_path_factory.mktemp("items"), source, count=30)


@pytest.fixture(scope="module")
def scores(source: Path, tasks: list[Task]) -> dict[str, TaskScores]:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    return evaluate(HFLM(pretrained=str(source), dtype="float32", device="cpu", batch_size=4), tasks)


def test_the_metric_follows_from_name_and_choices(tasks: list[Task]) -> None:
    assert {task.name: task.metric for task in tasks} == METRICS


@pytest.mark.parametrize("name", METRICS)
@torch.inference_mode()
def test_scores_are_their_definitions(
    name: str, source: Path, tasks: list[Task], scores: dict[str, TaskScores]
) -> None:
    model, tokenizer = Source.open(source).model(torch.float32), Source.open(source).tokenizer()
    (task,) = (task for task in tasks if task.name == name)
    right, bits = [], []
    for item in items(task):
        totals, greedy = [], []
        for choice in item["choices"]:
            ids = tokenizer(item["context"] + choice).input_ids
            start = len(tokenizer(item["context"].rstrip()).input_ids)  # trailing spaces belong to the choice
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
            totals.append(sum(logits.log_softmax(-1)[place, token].item() for place, token in enumerate(ids[start:])))
            greedy.append(logits.argmax(-1).tolist() == ids[start:])
        sizes = [len(choice.encode()) for choice in item["choices"]]
        bits.append(-totals[item["label"]] / math.log(2) / sizes[item["label"]])
        values = totals if name == "sciq" else [total / size for total, size in zip(totals, sizes, strict=True)]
        best = values.index(max(values)) == item["label"]
        right.append(float(greedy[item["label"]] if name == "lambada" else best))
    found = scores[name]
    assert found.right.tolist() == right
    assert 0 < sum(right) < len(right)
    assert found.bits_per_byte.tolist() == pytest.approx(bits, rel=1e-4)
    assert found.standard_error == pytest.approx(torch.tensor(right).std().item() / math.sqrt(len(right)))


def test_every_model_gets_the_same_items_and_another_seed_draws_others(tmp_path: Path) -> None:
    file = write_items(tmp_path / "sciq.jsonl", count=30)
    first, again, other = (read_task(file, 10, seed).items for seed in (0, 0, 1))
    assert first == again == tuple(sorted(first))
    assert len(set(first)) == 10
    assert first != other


@pytest.mark.parametrize("line", ["{", '{"context": "a", "label": 0}', "7"])
def test_a_file_without_items_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ToolError, match=r"items\.jsonl: not JSONL with context, choices and label"):
        read_task(file, 10, 0)


def test_a_single_item_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="1 items found, 5 asked for; a standard error needs 2"):
        read_task(write_items(tmp_path / "items.jsonl", count=1), 5, 0)
