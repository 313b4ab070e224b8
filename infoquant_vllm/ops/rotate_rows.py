"""Operation: rows into or out of the rotated residual basis of a tied model."""

import torch

from infoquant_vllm.ops.define import define
from infoquant_vllm.ops.table import kernel


def _rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    return kernel("rotate_rows", rows.device.type)(rows, rotation, gain)


def _fake(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


rotate_rows = define("rotate_rows", _rotate_rows, _fake)
