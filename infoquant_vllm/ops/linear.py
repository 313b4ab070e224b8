"""Operation: a linear layer of codes, from its input's transform to the product (opaque to torch.compile)."""

import torch

from infoquant_vllm.ops.define import define
from infoquant_vllm.ops.table import kernel


def prepare_weight(packed: torch.Tensor, num_bits: int, signed: bool, groups: int) -> torch.Tensor:
    """Checkpoint bytes [N, K * num_bits / 8] in the layout that the device's kernel reads.

    groups: the finer of both groupings, of the weights and of the activations.
    """
    return kernel("prepare_weight", packed.device.type)(packed, num_bits, signed, groups)


def prepare_grid(grid: torch.Tensor) -> torch.Tensor:
    """Scales or zero points of weights [N, groups], of the same shape, as the device's kernel reads them."""
    return kernel("prepare_grid", grid.device.type)(grid)


def prepare_matrices(matrices: list[torch.Tensor], hadamard: int, device: str) -> list[torch.Tensor]:
    """The input transform's matrices as the device's kernel reads them; hadamard: the size of its blocks, or 0."""
    return kernel("prepare_matrices", device)(matrices, hadamard)


def _linear(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    clip: torch.Tensor | None,
    num_bits: int,
    symmetric: bool,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    run = kernel("linear", x.device.type)
    return run(x, matrices, hadamard, clip, num_bits, symmetric, weight, weight_scale, weight_zero, bias)


def _fake(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    clip: torch.Tensor | None,
    num_bits: int,
    symmetric: bool,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight_scale.shape[0]))


linear = define("linear", _linear, _fake)
