"""Operation: rows into or out of the rotated residual basis of a tied model."""

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from infoquant_vllm.ops.table import kernel


def _rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    return kernel("rotate_rows", rows.device.type)(rows, rotation, gain)


def _fake(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


direct_register_custom_op("infoquant_rotate_rows", _rotate_rows, fake_impl=_fake)
rotate_rows = torch.ops.vllm.infoquant_rotate_rows
