"""Operation: exact product of quantised activations and quantised weights."""

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from infoquant_vllm.ops.table import kernel


def prepare_weight(packed: torch.Tensor, num_bits: int, signed: bool, groups: int) -> torch.Tensor:
    """Checkpoint bytes [N, K * num_bits / 8] in the layout that the device's kernel reads.

    groups: the finer of both groupings, of the weights and of the activations.
    """
    return kernel("prepare_weight", packed.device.type)(packed, num_bits, signed, groups)


def prepare_grid(grid: torch.Tensor) -> torch.Tensor:
    """Scales or zero points of weights [N, groups], of the same shape, as the device's kernel reads them."""
    return kernel("prepare_grid", grid.device.type)(grid)


def _quantized_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    run = kernel("quantized_linear", codes.device.type)
    return run(codes, scale, zero, weight, weight_scale, weight_zero, bias, num_bits, dtype)


def _fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    num_bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], weight_scale.shape[0]), dtype=dtype)


direct_register_custom_op("infoquant_quantized_linear", _quantized_linear, fake_impl=_fake)
quantized_linear = torch.ops.vllm.infoquant_quantized_linear
