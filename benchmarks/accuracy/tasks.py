"""Score tasks of JSONL files with lm-eval, without network: multiple choice and last words."""

import json
import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common.server import Server
from offline.errors import ToolError
from offline.evaluate.tasks import completions_client

if TYPE_CHECKING:
    from lm_eval.api.model import LM

MAX_TOKENS = 2048
"""Longest prompt of a task; lm-eval cuts longer ones at their start."""
BY_SUM = ("sciq", "arc_easy")
"""Tasks whose choices are compared by log-likelihood; in other tasks it is divided by the bytes of the choice."""


@dataclass(frozen=True)
class Task:
    """Some items of a JSONL file, by line number from 0; each line has `context`, `choices` and `label`.

    metric: of lm-eval; `exact_match` is 1 where greedy decoding gives the choice.
    """

    file: Path
    metric: str
    items: tuple[int, ...]

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.file.stem


@dataclass(frozen=True)
class TaskScores:
    """A model's scores in one task, and lm-eval's standard error of their mean.

    right: the metric per item, 0 or 1, float64 [items].
    bits_per_byte: bits that the model needs per byte of the right choice, float64 [items].
    """

    metric: str
    right: torch.Tensor
    bits_per_byte: torch.Tensor
    standard_error: float


def read_task(file: Path, items: int, seed: int) -> Task:
    """Draw at most `items` lines of a JSONL file, in the file's order.

    The metric is `exact_match` where each line has one choice, `acc` for the tasks in BY_SUM, else `acc_bytes`.
    Raises ToolError where the file is not JSONL or has fewer than 2 lines.
    """
    try:
        lines = [json.loads(line) for line in file.open(encoding="utf-8") if line.strip()]
        one_choice = all(len(line["choices"]) == 1 for line in lines)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ToolError(f"{file}: not JSONL with context, choices and label ({error!r})") from None
    if min(len(lines), items) < 2:
        raise ToolError(f"{file}: {len(lines)} items found, {items} asked for; a standard error needs 2")
    drawn = random.Random(f"{seed} {file.stem}").sample(range(len(lines)), min(items, len(lines)))
    by_choice = "acc" if file.stem in BY_SUM else "acc_bytes"
    return Task(file, "exact_match" if one_choice else by_choice, tuple(sorted(drawn)))


def served_model(server: Server, max_tokens: int) -> "LM":
    """Return lm-eval's client of a server, whose model has at most `max_tokens`."""
    return completions_client(server.url, str(server.model), str(server.model), max_tokens)


def evaluate(model: "LM", tasks: Sequence[Task]) -> dict[str, TaskScores]:
    """Run lm-eval; return each task's scores by its name."""
    if not tasks:
        return {}
    import lm_eval
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as cache:
        found = lm_eval.simple_evaluate(
            model,
            tasks=[_config(task, cache) for task in tasks],
            samples={task.name: list(task.items) for task in tasks},
            task_manager=TaskManager(include_defaults=False),
        )
    assert found is not None  # None is for the other processes of a distributed run
    return {task.name: _scores(task, found["samples"][task.name], found["results"][task.name]) for task in tasks}


def _config(task: Task, cache: str) -> dict[str, Any]:
    """Return lm-eval's definition of a task."""
    return {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(task.file)}, "cache_dir": cache},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": task.metric, "aggregation": "mean", "higher_is_better": True}],
    }


def _scores(task: Task, samples: list[dict[str, Any]], results: dict[str, Any]) -> TaskScores:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    right = [float(sample[task.metric]) for sample in samples]
    bits = [_bits_per_byte(sample["doc"], sample["filtered_resps"]) for sample in samples]
    error = float(results[f"{task.metric}_stderr,none"])
    return TaskScores(
        task.metric, torch.tensor(right, dtype=torch.float64), torch.tensor(bits, dtype=torch.float64), error
    )


def _bits_per_byte(item: dict[str, Any], replies: list[tuple[float, bool]]) -> float:
    """Divide the bits of the right choice by its bytes; `replies` has log-likelihood (nats) and greediness."""
    label = item["label"]
    return -float(replies[label][0]) / math.log(2) / len(item["choices"][label].encode())
