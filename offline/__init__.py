"""The quantization tool: a model in, a checkpoint that `vllm serve` loads out. It never imports vllm."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from offline.errors import ToolError

if TYPE_CHECKING:
    from offline.goal import Budget
    from offline.output.report import Report
    from offline.pipeline import quantize
    from offline.presets import PRESETS
    from offline.recipe import Recipe, load_recipe

__all__ = ["PRESETS", "Budget", "Recipe", "Report", "ToolError", "load_recipe", "quantize"]

_HOMES = {
    "quantize": "offline.pipeline",
    "PRESETS": "offline.presets",
    "Budget": "offline.goal",
    "Recipe": "offline.recipe",
    "load_recipe": "offline.recipe",
    "Report": "offline.output.report",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds that `infoquant --help` need not wait."""
    if name not in _HOMES:
        raise AttributeError(f"module 'offline' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
