"""The model card of a checkpoint."""

from offline.recipe import Recipe
from offline.report import Report


def model_card(name: str, recipe: Recipe, report: Report) -> str:
    """README.md of the checkpoint folder: what it is, how to serve it, its figures and its recipe."""
    return f"""---
library_name: vllm
tags:
- infoquant
- w4a4kv4
base_model: {report.source}
---
# {name}

{report.source} in {report.bits_per_weight:.2f} bits per weight of its linear layers, made by `infoquant quantize`
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

The whole recipe is in `infoquant_recipe.yaml`, the errors of each layer are in `infoquant_report.json`.
The licence of the source model applies.
"""


def _row(before: int, after: int, unit: float = 1e6) -> str:
    digits = 0 if unit == 1 else 1
    return f"{before / unit:.{digits}f} | {after / unit:.{digits}f} | {after / before:.3f}"
