"""The quantisation tool: a model in, a checkpoint that `vllm serve` loads out. It never imports vllm."""

from offline.errors import ToolError
from offline.pipeline import quantize
from offline.recipe import PRESETS, Recipe, load_recipe
from offline.report import Report

__all__ = ["PRESETS", "Recipe", "Report", "ToolError", "load_recipe", "quantize"]
