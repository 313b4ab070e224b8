"""Operation: product with an unquantised matrix, the vocabulary's."""

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from infoquant_vllm.ops.table import kernel


def _dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return kernel("dense_linear", x.device.type)(x, weight)


def _fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


direct_register_custom_op("infoquant_dense_linear", _dense_linear, fake_impl=_fake)
dense_linear = torch.ops.vllm.infoquant_dense_linear
