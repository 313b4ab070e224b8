"""Write the model card of a checkpoint."""

from offline.model.source import HUB_ID
from offline.output.report import Report
from offline.recipe import Recipe


def model_card(name: str, recipe: Recipe, report: Report) -> str:
    """Return the README.md of a checkpoint: origin, how to serve it, figures and recipe."""
    return f"""---
library_name: vllm
pipeline_tag: text-generation
tags:
- infoquant
- {_tag(recipe)}
{_base_model(report.source)}---
# {name}

{report.source} {_what(recipe, report)}, made by `infoquant quantize`
with the recipe `{recipe.name}` (transform {recipe.transform}, rounding {recipe.rounding}, calibration
`{report.calibration}`, seed {report.seed}).

```
pip install infoquant-vllm
vllm serve PATH-OF-THIS-FOLDER
```

| | source | this checkpoint | ratio |
|---|---|---|---|
| linear layers, MB | {_row(report.source_linear_bytes, report.linear_bytes)} |
| all tensors, MB | {_row(report.source_bytes, report.total_bytes)} |
| KV cache, bytes per token | {_row(report.source_kv_bytes_per_token, report.kv_bytes_per_token, 1)} |

{_errors(report)}
The recipe is in `infoquant_recipe.yaml`, the errors of each layer are in `infoquant_report.json`.
The license of the source model applies.
"""


def _tag(recipe: Recipe) -> str:
    """Name the bits, for the hub's search."""
    return "kv4" if recipe.rounding == "none" else "w4a4kv4"


def _what(recipe: Recipe, report: Report) -> str:
    """Say what is quantized."""
    if recipe.rounding == "none":
        return "with a quantized KV cache and unquantized linear layers"
    return f"in {report.bits_per_weight:.2f} bits per weight of its linear layers"


def _base_model(source: str) -> str:
    """Return the metadata of the source where it has a hub id; the hub refuses other names."""
    return f"base_model: {source}\nbase_model_relation: quantized\n" if HUB_ID.match(source) else ""


def _errors(report: Report) -> str:
    """Describe what weight rounding lost, where it was measured."""
    if not report.errors:
        return ""
    worst = max(report.errors, key=lambda name: report.errors[name])
    mean = sum(report.errors.values()) / len(report.errors)
    return (
        f"On {report.calibration_tokens} calibration tokens, weight rounding loses {mean:.2%} of the energy of a"
        f" linear's output on average,\n{report.errors[worst]:.2%} in the worst linear (`{worst}`).\n"
    )


def _row(before: int, after: int, unit: float = 1e6) -> str:
    digits = 0 if unit == 1 else 1
    return f"{before / unit:.{digits}f} | {after / unit:.{digits}f} | {after / before:.3f}"
