"""Transforms that leave a model's function unchanged, and how they apply to inputs, weights and Hessians."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from infoquant_vllm.format import InputTransform, ModelShape, apply_hadamard, hadamard, hadamard_dense
from infoquant_vllm.kernels.torch.quantize import apply_transform

ROWS_AT_A_TIME = 256
"""Rows of a weight or a Hessian that are transformed in float64 at once; bounds peak memory."""

InputTensors = dict[str, torch.Tensor]
"""Tensors of an `InputTransform` in the checkpoint, float32 by local names; empty for types none and hadamard."""


@dataclass(frozen=True)
class Transforms:
    """Rotations of one model. Those folded into weights are orthogonal, float64; None is the identity.

    residual: R1, [hidden, hidden], the basis of the residual stream, x_rot = x @ residual
    heads: R2, [layers, kv_heads, head_dim, head_dim], the basis of each head's values
    inputs: by layer and site, the matrices that inputs are multiplied by at run time; empty where no site
        has such matrices. The Hadamard transforms R3 and R4, which are online too, have none: the recipe sets them
    """

    residual: torch.Tensor | None
    heads: torch.Tensor | None
    inputs: Sequence[dict[str, InputTensors]] = ()

    def orthogonality_error(self, layer: int) -> float | None:
        """Return the largest entry of |Q^T Q - I| over a layer's own rotations; None if it has none."""
        found = [] if self.heads is None else [self.heads[layer]]
        if self.inputs:
            found += [matrix for tensors in self.inputs[layer].values() for matrix in tensors.values()]
        return max((orthogonality_error(matrix.double()) for matrix in found), default=None)


def orthogonality_error(matrix: torch.Tensor) -> float:
    """Return the largest entry of |Q^T Q - I| over matrices [..., n, n]."""
    return (matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype)).abs().max().item()


def random_hadamard(size: int, generator: torch.Generator) -> torch.Tensor:
    """Return an orthogonal matrix [size, size] float64: the format's Hadamard matrix with random row signs."""
    return _random_signs((size, 1), generator) * hadamard(size)


def random_head_rotations(shape: ModelShape, generator: torch.Generator) -> torch.Tensor:
    """Return a random-sign Hadamard matrix per layer and kv-head, [layers, kv_heads, head_dim, head_dim] float64."""
    signs = _random_signs((shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, 1), generator)
    return signs * hadamard(shape.head_dim)


def transform_input(
    x: torch.Tensor,
    transform: InputTransform,
    tensors: InputTensors,
    by_hadamard: Callable[[torch.Tensor], torch.Tensor] = apply_hadamard,
) -> torch.Tensor:
    """Apply a checkpoint's input transform to x [rows, K], with the roundings of the server; keep the dtype of x.

    `tensors` holds its matrices by their local names. Training passes `hadamard_product` as `by_hadamard`.
    """
    return apply_transform(x, *transform_operands(transform, tensors), by_hadamard)


def transform_operands(transform: InputTransform, tensors: InputTensors) -> tuple[list[torch.Tensor], int]:
    """Return a transform as kernels take it: its matrices, and the size of its Hadamard blocks or 0."""
    if transform.type == "hadamard":
        return [], transform.block_size or 0
    return [tensors[name] for name in ("input_blocks", "input_left", "input_right") if name in tensors], 0


def hadamard_product(x: torch.Tensor) -> torch.Tensor:
    """Return x [..., size] @ hadamard(size) by matrix multiplications: fast and differentiable, other last bits."""
    dense = hadamard_dense(x.shape[-1]).to(x)
    rows = x.unflatten(-1, (len(dense), -1))
    rows = rows @ hadamard(rows.shape[-1]).to(x)
    return (rows if len(dense) == 1 else dense.T @ rows / math.sqrt(len(dense))).flatten(-2)


def undo_in_weights(weight: torch.Tensor, transform: InputTransform, tensors: InputTensors) -> torch.Tensor:
    """Return W' = W R^-T for weight [N, K], so that (x R) W'^T = x W^T; computed in float64, returned as float32.

    R need not be orthogonal; hadamard(n) is, and equals its own R^-T.
    """
    if transform.type == "none":
        return weight
    inverse = {name: torch.linalg.inv(matrix.double()).mT for name, matrix in tensors.items()}
    undone = torch.empty_like(weight)
    for rows, out in zip(weight.split(ROWS_AT_A_TIME), undone.split(ROWS_AT_A_TIME), strict=True):
        out.copy_(transform_input(rows.double(), transform, inverse, hadamard_product))
    return undone


def transform_hessian(hessian: torch.Tensor, transform: InputTransform, tensors: InputTensors) -> torch.Tensor:
    """Turn the Hessian [K, K] float32 of inputs x into R^T H R, that of x R, in place; multiplies in float64."""
    if transform.type == "none":
        return hessian
    for side in (hessian, hessian.T):
        for rows in side.split(ROWS_AT_A_TIME):
            rows.copy_(transform_input(rows.double(), transform, tensors, hadamard_product))
    return hessian


def _random_signs(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, size, generator=generator).to(torch.float64) * 2 - 1
