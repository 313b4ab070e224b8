"""What a checkpoint may take or cost, in place of a preset."""

import re
from dataclasses import dataclass

from offline.errors import ToolError

RESERVE = 0.1
"""Share of the memory of `fit` that weights and cache leave free: what vLLM leaves free by default."""
UNITS = {"mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20}


@dataclass(frozen=True)
class Budget:
    """What a checkpoint may take or cost: one of three goals.

    target_bits: of a weight of the linears on average, with all that is stored for them
    max_kl: KL to the source in nats per token, before distillation; the least bytes then
    fit: bytes of memory that hold the weights, a KV cache of `context` tokens, and a RESERVE
    """

    target_bits: float | None = None
    max_kl: float | None = None
    fit: int | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        """Refuse budgets without a goal, with more than one, and with values that mean nothing."""
        goals = {"--target-bits": self.target_bits, "--max-kl": self.max_kl, "--fit": self.fit}
        given = [name for name, value in goals.items() if value is not None]
        if len(given) != 1:
            raise ToolError(f"{' and '.join(given) or 'no budget'}: give one of {', '.join(goals)}")
        if (self.fit is None) != (self.context is None):
            raise ToolError("--context, the tokens that the KV cache holds, goes with --fit, and --fit with --context")
        for name, value in {**goals, "--context": self.context}.items():
            if value is not None and not 0 < value < float("inf"):
                raise ToolError(f"{name} is {value}, expected a number above 0")

    @property
    def goal(self) -> str:
        """Return the budget in words."""
        if self.target_bits is not None:
            return f"{self.target_bits:g} bits per weight"
        if self.max_kl is not None:
            return f"KL {self.max_kl:g}"
        assert self.fit is not None
        return f"{self.fit / 1e9:g} GB with a cache of {self.context} tokens"


def read_budget(target_bits: float | None, max_kl: float | None, fit: str | None, context: str | None) -> Budget | None:
    """Return the budget of the command's options; None where none is given."""
    if all(option is None for option in (target_bits, max_kl, fit, context)):
        return None
    return Budget(target_bits, max_kl, _amount(fit, "--fit"), _amount(context, "--context"))


def _amount(text: str | None, option: str) -> int | None:
    """Read "24GB", "64k" or a number; raises ToolError naming the option."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if found is None or (found[2] and found[2].lower() not in UNITS):
        raise ToolError(f"{option} is {text!r}, expected a number with or without one of {', '.join(UNITS)}")
    return int(float(found[1]) * UNITS.get(found[2].lower(), 1))
