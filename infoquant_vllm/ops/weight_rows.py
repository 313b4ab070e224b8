"""Operation: rows of an 8-bit weight matrix that a kernel has laid out for products."""

import torch

from infoquant_vllm.ops.define import define
from infoquant_vllm.ops.table import kernel


def _weight_rows(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    return kernel("weight_rows", weight.device.type)(weight, rows, features)


def _fake(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    return weight.new_empty((*rows.shape, features), dtype=torch.int8)


weight_rows = define("weight_rows", _weight_rows, _fake)
