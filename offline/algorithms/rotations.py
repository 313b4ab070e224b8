"""Transforms that leave a model's function unchanged, and their application along an axis."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from infoquant_vllm.format import InputTransform, ModelShape, apply_hadamard, hadamard, hadamard_dense

ROWS_AT_A_TIME = 256
"""Of a weight or a Hessian as it is transformed in float64."""

InputTensors = dict[str, torch.Tensor]
"""What an `InputTransform` reads from the checkpoint, float32 by local names; none for type none and hadamard."""


@dataclass(frozen=True)
class Transforms:
    """The matrices of one model. Those folded into weights are orthogonal, float64; None is the identity.

    residual: [hidden, hidden], the basis of the residual stream, x_rot = x @ residual
    heads: [layers, kv_heads, head_dim, head_dim], the basis of each head's values
    inputs: of each layer, by site, what linears multiply their inputs by at run time; empty where
        no site has such matrices (the recipe tells which sites have a Hadamard)
    """

    residual: torch.Tensor | None
    heads: torch.Tensor | None
    inputs: Sequence[dict[str, InputTensors]] = ()

    def orthogonality_error(self, layer: int) -> float | None:
        """The largest entry of |Q^T Q - I| over a layer's rotations; None where it has none of its own."""
        found = [] if self.heads is None else [self.heads[layer]]
        if self.inputs:
            found += [matrix for tensors in self.inputs[layer].values() for matrix in tensors.values()]
        return max((orthogonality_error(matrix.double()) for matrix in found), default=None)


def orthogonality_error(matrix: torch.Tensor) -> float:
    """Largest entry of |Q^T Q - I| over matrices [..., n, n]."""
    return (matrix.mT @ matrix - torch.eye(matrix.shape[-1], dtype=matrix.dtype)).abs().max().item()


def random_hadamard(size: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal matrix [size, size] float64: the format's Hadamard with random row signs."""
    return _random_signs((size, 1), generator) * hadamard(size)


def random_head_rotations(shape: ModelShape, generator: torch.Generator) -> torch.Tensor:
    """A random-sign Hadamard per layer and kv-head, [layers, kv_heads, head_dim, head_dim] float64."""
    signs = _random_signs((shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, 1), generator)
    return signs * hadamard(shape.head_dim)


def transform_input(
    x: torch.Tensor,
    transform: InputTransform,
    tensors: InputTensors,
    by_hadamard: Callable[[torch.Tensor], torch.Tensor] = apply_hadamard,
) -> torch.Tensor:
    """y = x @ R for x [rows, K], in the dtype of x; `tensors` holds the transform's by their local names.

    Rounds as the server does: sums over a learned matrix are in float64. What trains gives
    `hadamard_product` for `by_hadamard`.
    """
    if transform.type == "hadamard" and transform.block_size is not None:
        return by_hadamard(x.unflatten(1, (-1, transform.block_size))).flatten(1)
    if transform.type == "blocks" and transform.block_size is not None:
        blocks = x.unflatten(1, (-1, transform.block_size)).transpose(0, 1)
        return (blocks.double() @ tensors["input_blocks"].double()).to(x.dtype).transpose(0, 1).flatten(1)
    if transform.type == "kronecker":
        return apply_kronecker(x, tensors["input_left"], tensors["input_right"])
    return x


def hadamard_product(x: torch.Tensor) -> torch.Tensor:
    """x [..., size] @ hadamard(size) by matrix products: few operations, for gradients and speed; other last bits."""
    dense = hadamard_dense(x.shape[-1]).to(x)
    rows = x.unflatten(-1, (len(dense), -1))
    rows = rows @ hadamard(rows.shape[-1]).to(x)
    return (rows if len(dense) == 1 else dense.T @ rows / math.sqrt(len(dense))).flatten(-2)


def undo_in_weights(weight: torch.Tensor, transform: InputTransform, tensors: InputTensors) -> torch.Tensor:
    """W' = W R^-T for weight [N, K], so that (x R) W'^T = x W^T; computed in float64, returned as float32.

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
    """R^T H R, of inputs x R where `hessian` [K, K] float32 is that of x; each product in float64, in its place."""
    if transform.type == "none":
        return hessian
    for side in (hessian, hessian.T):
        for rows in side.split(ROWS_AT_A_TIME):
            rows.copy_(transform_input(rows.double(), transform, tensors, hadamard_product))
    return hessian


def apply_kronecker(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x [..., a * b] @ (left [a, a] (x) right [b, b]): left first, each sum in float64, rounded to the dtype of x."""
    rows = x.reshape(-1, len(left), len(right)).double()
    halfway = (left.double().mT @ rows).to(x.dtype)
    return (halfway.double() @ right.double()).to(x.dtype).view(x.shape)


def _random_signs(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, size, generator=generator).to(torch.float64) * 2 - 1
