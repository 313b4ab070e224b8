"""Summarize scores as the figures of a result row, each with its standard error (`..._se`)."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.accuracy.scores import Scores, kl_divergence, same_first, standard_error
from benchmarks.accuracy.tasks import TaskScores


def text_figures(reference: Scores | None, scores: Scores) -> dict[str, float]:
    """Return perplexity and, with a reference, top-1 agreement and the lower bound of KL(reference || model), in nats.

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


def task_figures(scores: Mapping[str, TaskScores], reference: Mapping[str, TaskScores] | None) -> dict[str, Any]:
    """Return the mean score of each task ("tasks") and of all tasks ("task_mean").

    With a reference also "difference", the mean over items of the score minus the reference's. Standard
    errors are over items; tasks are independent draws, so the error of their mean follows from them.
    """
    if not scores:
        return {}
    by_task: dict[str, dict[str, Any]] = {}
    for name, task in scores.items():
        score = {"score": float(task.right.mean()), "score_se": task.standard_error}
        by_task[name] = {"metric": task.metric, **score, **_mean("bits_per_byte", task.bits_per_byte)}
        if reference is not None:
            by_task[name] |= _mean("difference", task.right - reference[name].right)
    names = ["score"] if reference is None else ["score", "difference"]
    return {"tasks": by_task, "task_mean": {k: v for name in names for k, v in _over_tasks(name, by_task).items()}}


def _mean(name: str, values: torch.Tensor) -> dict[str, float]:
    """Average [items], which are drawn independently."""
    return {name: float(values.mean()), f"{name}_se": float(values.std() / math.sqrt(len(values)))}


def _over_tasks(name: str, by_task: dict[str, dict[str, Any]]) -> dict[str, float]:
    count = len(by_task)
    error = math.sqrt(sum(figures[f"{name}_se"] ** 2 for figures in by_task.values())) / count
    return {name: sum(figures[name] for figures in by_task.values()) / count, f"{name}_se": error}
