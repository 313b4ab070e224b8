"""Choose one option of each group under limits, by integer programming: a multiple-choice knapsack problem."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

OPTIONS = {
    "mip_rel_gap": 1e-5,  # share by which the objective may be above its lower bound
    "node_limit": 100_000,  # after which the best choice so far counts: a limit of time would depend on the machine
    "presolve": False,  # whose HiGHS 1.12 writes to standard output, where --json has its result
}
OBJECTIVE_SCALE = 1e4
"""Sum of the scaled objective, far above the solver's absolute tolerance of 1e-6."""

Amounts = Sequence[Sequence[float]]
"""By group and option."""


@dataclass(frozen=True)
class Limit:
    """The sum of `amounts` over the chosen options is at most `most`."""

    amounts: Amounts
    most: float

    def used(self, chosen: Sequence[int]) -> float:
        """Return the sum over the chosen options."""
        return math.fsum(own[index] for own, index in zip(self.amounts, chosen, strict=True))


def choose(objective: Amounts, limits: Sequence[Limit]) -> list[int] | None:
    """Return the option of each group with the least sum of `objective` within all limits; None where none is.

    The solver keeps limits up to a tolerance; here they hold exactly.
    """
    tried = [limit.most for limit in limits]
    while True:
        chosen = _solve(objective, limits, tried)
        if chosen is None:
            return None
        above = [limit.used(chosen) - limit.most for limit in limits]
        if max(above, default=0) <= 0:
            return chosen
        tried = [most - max(0.0, 2 * excess) for most, excess in zip(tried, above, strict=True)]


def _solve(objective: Amounts, limits: Sequence[Limit], most: Sequence[float]) -> list[int] | None:
    sizes = [len(own) for own in objective]
    costs = np.concatenate([np.asarray(own, dtype=float) for own in objective])
    total = np.abs(costs).sum() or 1.0
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(len(costs)), (group_of, np.arange(len(costs)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for limit, bound in zip(limits, most, strict=True):
        row = np.concatenate([np.asarray(own, dtype=float) for own in limit.amounts])
        scale = np.abs(row).max() or 1.0
        constraints.append(LinearConstraint((row / scale)[None], -np.inf, bound / scale))
    found = milp(
        costs * (OBJECTIVE_SCALE / total),
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options=OPTIONS,
    )
    if found.x is None:
        return None
    ends = np.cumsum(sizes)[:-1]
    return [int(np.argmax(own)) for own in np.split(found.x, ends)]
