"""Rotations that leave a model's function unchanged, and their application along an axis."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infoquant_vllm.format import ModelShape, hadamard, hadamard_factors


@dataclass(frozen=True)
class Transforms:
    """The orthogonal matrices folded into one model, all float64.

    residual: [hidden, hidden], the basis of the residual stream, x_rot = x @ residual
    heads: [layers, kv_heads, head_dim, head_dim], the basis of each head's values
    The input of down_proj is multiplied at run time by `hadamard(intermediate_size)`.
    """

    residual: torch.Tensor
    heads: torch.Tensor


def random_hadamard(size: int, generator: torch.Generator) -> torch.Tensor:
    """An orthogonal matrix [size, size] float64: the format's Hadamard with random row signs."""
    return _random_signs((size, 1), generator) * hadamard(size)


def random_head_rotations(shape: ModelShape, generator: torch.Generator) -> torch.Tensor:
    """A random-sign Hadamard per layer and kv-head, [layers, kv_heads, head_dim, head_dim] float64."""
    signs = _random_signs((shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, 1), generator)
    return signs * hadamard(shape.head_dim)


def apply_hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., size] @ hadamard(size), one Kronecker factor at a time, in the dtype of x."""
    return apply_kronecker(x, hadamard_factors(x.shape[-1]))


def apply_kronecker(x: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """x [..., K] @ (factors[0] (x) factors[1] (x) ...), where the factors' sizes multiply to K."""
    y = x.reshape(-1, *(len(factor) for factor in factors))
    for axis, factor in enumerate(factors, start=1):
        product = torch.tensordot(y, factor.to(x), dims=([axis], [0]))
        y = product.movedim(-1, axis)
    return y.reshape(x.shape)


def _random_signs(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, size, generator=generator).to(torch.float64) * 2 - 1
