"""Operation: product of a 16-bit input, rotated where the layer says so, and quantised weights."""

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from infoquant_vllm.ops.table import kernel


def _weight_only_linear(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return kernel("weight_only_linear", x.device.type)(x, matrices, hadamard, weight, weight_scale, weight_zero, bias)


def _fake(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight_scale.shape[0]))


direct_register_custom_op("infoquant_weight_only_linear", _weight_only_linear, fake_impl=_fake)
weight_only_linear = torch.ops.vllm.infoquant_weight_only_linear
