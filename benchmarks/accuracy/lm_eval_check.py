"""Whether this project's task scorer and lm-eval agree, item by item and choice by choice.

The model is served by `vllm serve` and scored over its API; lm-eval, which must be installed, runs the
same items through transformers, from YAML tasks over JSONL files. Both compute in float32.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.tasks import Answer, Task, answer, is_right, read_task
from benchmarks.common.server import serve, stop_on_sigterm
from offline.model.source import read_tokenizer

TOLERANCE = 0.01
"""Nats between two sums of log-likelihoods of a choice."""

LM_EVAL_METRICS = {"acc": "acc", "acc_norm": "acc_bytes", "greedy": "exact_match"}
"""lm-eval's acc_norm divides by characters, and its acc_bytes by bytes."""


@dataclass
class Comparison:
    """One task's disagreements: the largest of log-likelihoods, in nats, and the number of verdicts that differ."""

    task: Task
    largest: float
    verdicts: int

    @property
    def agrees(self) -> bool:
        """Whether nothing is left but rounding."""
        return self.largest <= TOLERANCE and self.verdicts == 0


def main() -> None:
    """Compare, print a line per task, exit with 1 where one disagrees."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.lm_eval_check", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of an unquantized model")
    parser.add_argument("tasks", type=Path, nargs="+", help="JSONL files: context, choices, label")
    parser.add_argument("--items", type=int, default=50, help="how many items of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of items")
    options = parser.parse_args()
    stop_on_sigterm()
    tokenizer = read_tokenizer(options.model)
    found = compare(options.model, [read_task(file, tokenizer, options.items, options.seed) for file in options.tasks])
    for one in found:
        print(
            f"{one.task.name}: {len(one.task.items)} items, log-likelihoods at most {one.largest:.2g} nats apart, "
            f"{one.verdicts} verdicts of {one.task.metric} differ"
        )
    sys.exit(not all(one.agrees for one in found))


def compare(model: Path, tasks: list[Task]) -> list[Comparison]:
    """Score the tasks both ways."""
    longest = max(task.longest() for task in tasks)
    with tempfile.TemporaryDirectory() as scratch:
        theirs = run_lm_eval(model, tasks, Path(scratch))
        limits = ("--dtype", "float32", "--max-model-len", str(longest + 1))
        with serve(model, Path(scratch) / "server.log", "--enforce-eager", *limits) as server:
            ours = answer(server, tasks, concurrent=8)
    return [_comparison(task, ours[task.name], theirs[task.name]) for task in tasks]


def run_lm_eval(model: Path, tasks: list[Task], folder: Path) -> dict[str, list[tuple[Answer, float]]]:
    """lm-eval's answer to every item and its verdict in the task's metric, by task; files go to `folder`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for task in tasks:
        write_task(task, folder)
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=8),
        tasks=[task.name for task in tasks],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return {task.name: _theirs(found["samples"][task.name], LM_EVAL_METRICS[task.metric]) for task in tasks}


def write_task(task: Task, folder: Path) -> None:
    """The items as JSONL and the lm-eval task, in JSON, which is YAML, that reads them."""
    items = folder / f"{task.name}.jsonl"
    items.write_text("".join(json.dumps(item.model_dump()) + "\n" for item in task.items))
    config = {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": LM_EVAL_METRICS[task.metric], "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{task.name}.yaml").write_text(json.dumps(config))


def _theirs(samples: list[dict[str, Any]], metric: str) -> list[tuple[Answer, float]]:
    answers = []
    for sample in sorted(samples, key=lambda one: one["doc_id"]):
        totals, greedy = zip(*sample["filtered_resps"], strict=True)
        answers.append((Answer([float(total) for total in totals], list(greedy)), float(sample[metric])))
    return answers


def _comparison(task: Task, ours: list[Answer], theirs: list[tuple[Answer, float]]) -> Comparison:
    apart, verdicts = 0.0, 0
    for item, here, (there, verdict) in zip(task.items, ours, theirs, strict=True):
        pairs = zip(here.loglikelihoods, there.loglikelihoods, strict=True)
        apart = max(apart, *(abs(a - b) for a, b in pairs))
        verdicts += is_right(item, here, task.metric) != verdict
    return Comparison(task, apart, verdicts)


if __name__ == "__main__":
    main()
