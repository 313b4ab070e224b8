"""From what servers said to the figures of a result's row, each with its standard error (`..._se`)."""

import math
from typing import Any

import torch

from benchmarks.accuracy.scores import Scores, kl_divergence, same_first, standard_error
from benchmarks.accuracy.tasks import Answer, Task, bits, right


def text_figures(reference: Scores | None, scores: Scores) -> dict[str, float]:
    """Perplexity and, with a reference, top-1 agreement and the lower bound of KL(reference || model), in nats.

    Standard errors are over windows.
    """
    perplexity = scores.perplexity()
    figures = {"perplexity": perplexity, "perplexity_se": perplexity * standard_error(scores.nll)}
    if reference is None:
        return figures
    bound, same = kl_divergence(reference, scores), same_first(reference, scores)
    return figures | {
        "top1_agreement": float(same.mean()),
        "top1_agreement_se": standard_error(same),
        "kl_lower_bound": float(bound.mean()),
        "kl_lower_bound_se": standard_error(bound),
    }


def task_figures(
    tasks: list[Task], answers: dict[str, list[Answer]], reference: dict[str, list[Answer]] | None
) -> dict[str, Any]:
    """Per task ("tasks") and of the tasks' mean ("task_mean") the share of right answers.

    With a reference also "difference", the mean over items of (right here) - (right there). Standard
    errors are over items; those of the mean over tasks, which are independent draws, follow from them.
    """
    if not tasks:
        return {}
    by_task: dict[str, dict[str, Any]] = {}
    for task in tasks:
        ours = right(task, answers[task.name])
        figures: dict[str, Any] = {"metric": task.metric, **_mean("score", ours)}
        figures |= _mean("bits_per_byte", bits(task, answers[task.name]))
        if reference is not None:
            figures |= _mean("difference", ours - right(task, reference[task.name]))
        by_task[task.name] = figures
    names = ["score"] if reference is None else ["score", "difference"]
    return {"tasks": by_task, "task_mean": {k: v for name in names for k, v in _over_tasks(name, by_task).items()}}


def _mean(name: str, values: torch.Tensor) -> dict[str, float]:
    """Of [items], drawn independently."""
    return {name: float(values.mean()), f"{name}_se": float(values.std() / math.sqrt(len(values)))}


def _over_tasks(name: str, by_task: dict[str, dict[str, Any]]) -> dict[str, float]:
    count = len(by_task)
    error = math.sqrt(sum(figures[f"{name}_se"] ** 2 for figures in by_task.values())) / count
    return {name: sum(figures[name] for figures in by_task.values()) / count, f"{name}_se": error}
