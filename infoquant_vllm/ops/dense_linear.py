"""Operation: product with an unquantized matrix, the vocabulary's."""

import torch

from infoquant_vllm.ops.define import define
from infoquant_vllm.ops.table import kernel


def _dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return kernel("dense_linear", x.device.type)(x, weight)


def _fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


dense_linear = define("dense_linear", _dense_linear, _fake)
