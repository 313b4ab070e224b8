"""Choose the number formats of a run under a budget, in place of those of a preset."""

import torch

from offline.algorithms.rotations import Transforms
from offline.budget_problem import Problem
from offline.errors import ToolError
from offline.goal import Budget
from offline.model.source import Source
from offline.output.report import BudgetReport
from offline.recipe import Recipe, first_used
from offline.run import Run
from offline.stages.sensitivity import measure_sensitivity


def check_budget(recipe: Recipe, source: Source) -> None:
    """Refuse base recipes whose formats a budget cannot choose."""
    wanted = {
        f"rounding '{recipe.rounding}'": recipe.rounding != "gptq",
        "transform 'psot-layer'": recipe.transform == "psot-layer",
        "learned_clips": recipe.learned_clips is not None,
        "a recipe with layers": bool(recipe.layers),
        "a mixture of experts": source.shape.experts is not None,
    }
    found = first_used(wanted)
    if found is not None:
        raise ToolError(
            f"a budget does not go with {found}; choose a dense model and preset fast, best, balanced or w4a8kv4"
        )


def apply_budget(run: Run, budget: Budget, tokens: torch.Tensor, transforms: Transforms | None) -> BudgetReport:
    """Measure what formats cost, and give the run the recipe that keeps the budget."""
    problem = Problem(run.source, run.recipe, budget)
    found = measure_sensitivity(run, tokens, transforms, problem.choices)
    with run.watch("choice"):
        chosen = problem.solve(found)
        recipe = problem.recipe(chosen)
        report = problem.report(chosen, found)
    run.recipe, run.config = recipe, recipe.quantization_config(run.source.shape)
    return report
