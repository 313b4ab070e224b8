"""Rotations are orthogonal for any size, and weights undo every transform of their inputs."""

import pytest
import torch

from infoquant_vllm.format import InputTransform, hadamard
from infoquant_vllm.kernels.torch.quantize import apply_transform
from offline.algorithms.rotations import (
    hadamard_product,
    random_hadamard,
    transform_hessian,
    transform_input,
    undo_in_weights,
)

ODD_SIZES = (1, 2, 3, 7, 12, 43, 60, 96, 172, 576, 1376)


def distance_from_orthogonal(matrix: torch.Tensor) -> float:
    return (matrix @ matrix.T - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max().item()


@pytest.mark.parametrize("size", ODD_SIZES)
def test_hadamard_by_products_is_the_formats(size: int) -> None:
    x = torch.randn(3, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard_product(x), x @ hadamard(size))


@pytest.mark.parametrize("size", ODD_SIZES)
def test_random_hadamard_is_orthogonal_for_any_size(size: int) -> None:
    assert distance_from_orthogonal(random_hadamard(size, torch.Generator().manual_seed(0))) < 1e-12


def test_kronecker_factors_act_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, n, dtype=torch.float64, generator=generator) for n in (3, 4))
    x = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(apply_transform(x, [left, right], 0), x @ torch.kron(left, right))


@pytest.mark.parametrize(
    ("transform", "sizes"),
    [
        (InputTransform(), {}),
        (InputTransform(type="hadamard", block_size=12), {}),
        (InputTransform(type="blocks", block_size=4), {"input_blocks": (6, 4, 4)}),
        (InputTransform(type="kronecker", factors=(3, 8)), {"input_left": (3, 3), "input_right": (8, 8)}),
    ],
)
def test_weights_undo_any_transform_of_their_inputs_and_its_hessian_is_theirs(
    transform: InputTransform, sizes: dict[str, tuple[int, ...]]
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    x, weight = (torch.randn(rows, 24, generator=generator) for rows in (50, 7))
    y = transform_input(x, transform, tensors)
    torch.testing.assert_close(y @ undo_in_weights(weight, transform, tensors).T, x @ weight.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(transform_hessian(x.T @ x, transform, tensors), y.T @ y, rtol=1e-4, atol=1e-2)
