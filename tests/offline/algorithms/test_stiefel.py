"""Steps along the manifold of orthogonal matrices stay on it and lead downhill."""

import pytest
import torch

from offline.algorithms.psot import cayley
from offline.algorithms.stiefel import cayley_step, retract


def random_rotations(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))[0]


def distance_from_orthogonal(matrix: torch.Tensor) -> float:
    return (matrix @ matrix.mT - torch.eye(matrix.shape[-1])).abs().max().item()


@pytest.mark.parametrize("learning_rate", [1e-3, 2.0])
@pytest.mark.parametrize("shape", [(16, 16), (3, 24, 24)])
def test_steps_keep_orthogonality_whatever_the_gradient(shape: tuple[int, ...], learning_rate: float) -> None:
    generator, rotations = torch.Generator().manual_seed(1), random_rotations(*shape)
    for _ in range(100):
        gradient = 50 * torch.randn(shape, generator=generator)
        rotations = cayley_step(rotations, gradient, learning_rate, generator)
    assert distance_from_orthogonal(rotations) < 0.02


def test_steps_find_the_rotation_that_is_asked_for() -> None:
    generator = torch.Generator().manual_seed(2)
    start = random_rotations(12, 12)
    goal = start @ cayley(0.2 * torch.randn(12, 12, generator=generator))
    rotation = start
    for _ in range(300):
        rotation = cayley_step(rotation, rotation - goal, 0.1, generator)
    assert (start - goal).norm() > 1
    assert (rotation - goal).norm() < 0.05


def test_retraction_is_orthogonal_and_leaves_what_already_is() -> None:
    rotations = random_rotations(3, 24, 24)
    torch.testing.assert_close(retract(rotations), rotations, rtol=0, atol=1e-5)
    bent = rotations + 0.01 * torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(3))
    assert distance_from_orthogonal(bent) > 0.01
    assert distance_from_orthogonal(retract(bent)) < 1e-5
    assert (retract(bent) - rotations).abs().max() < 0.1
