"""PSOT suppresses peaks by the published objective, and the shared rotation narrows what it was learned on."""

import pytest
import torch

from offline.algorithms.psot import (
    SharedRotation,
    cayley,
    center,
    head_loss,
    input_loss,
    peak_norm,
    rotate,
    smooth_range,
)
from offline.algorithms.rotations import random_hadamard


def distance_from_orthogonal(matrix: torch.Tensor) -> float:
    return (matrix @ matrix.T - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max().item()


@pytest.mark.parametrize("size", [3, 96, 172])
def test_cayley_of_any_matrix_is_a_rotation(size: int) -> None:
    parameter = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = cayley(parameter)
    assert distance_from_orthogonal(rotation) < 1e-10
    assert torch.linalg.det(rotation).item() == pytest.approx(1)


def test_shared_rotation_is_orthogonal_seeded_and_narrows_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(96, 96, generator=generator) * torch.logspace(0, -2, 96)
    inputs = torch.randn(512, 96, generator=generator) @ mixing
    start = random_hadamard(96, generator)

    def learn() -> torch.Tensor:
        rotation, rows = SharedRotation(inputs, start, 1, 0.02, 40), torch.Generator().manual_seed(1)
        for _ in range(40):
            rotation.step(torch.randint(512, (128,), generator=rows))
        return rotation.matrix()

    learned = learn()
    assert torch.equal(learned, learn())
    assert distance_from_orthogonal(learned) < 1e-10
    rotated = (inputs @ rotation.float() for rotation in (start, learned))
    before, after = (y.amax(1) - y.amin(1) for y in rotated)
    assert after.square().mean() < 0.95 * before.square().mean()


def test_shared_rotation_continues_from_a_saved_state_with_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, start = torch.randn(64, 32, generator=generator), random_hadamard(32, generator)
    whole, first, second = (SharedRotation(inputs, start, 2, 0.02, 6) for _ in range(3))
    rows = torch.randint(64, (6, 16), generator=generator)
    for step in range(6):
        whole.step(rows[step])
    for step in range(3):
        first.step(rows[step])
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()}, 3)
    for step in range(3, 6):
        second.step(rows[step])
    assert torch.equal(second.matrix(), whole.matrix())


def test_rotation_that_spreads_an_outlier_lowers_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 32, 2, 1, 16, generator=generator)
    x[:, 0, 0, 0, 5] = 40.0
    weights = torch.ones(8, 32)
    weights[:, 0] = 30.0
    loss, identity = input_loss(x, weights, 2.0), torch.eye(16).expand(2, 16, 16).contiguous()
    spread = torch.linalg.qr(torch.randn(2, 16, 16, generator=generator))[0]
    assert loss(spread, slice(0, 8)) < 0.7 * loss(identity, slice(0, 8))


def test_smooth_range_is_the_formula_and_zeros_have_no_gradient() -> None:
    y = torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss = smooth_range(y)
    assert loss.item() == pytest.approx((((3**8 + 2**8) ** (1 / 8) + 1) ** 2) / 2, rel=1e-3)
    (gradient,) = torch.autograd.grad(loss, y)
    assert torch.equal(gradient[1], torch.zeros(3))
    assert (gradient[0] * y[0].sign() > 0).all()


def test_peak_norm_is_the_formula() -> None:
    y, weights = torch.tensor([[1.0, -3.0], [2.0, 0.0]]), torch.tensor([1.0, 30.0])
    p = torch.tensor([[0.5, 1.5], [1.0, 0.0]]).softmax(1)  # of |y| / temperature
    expected = ((p[0, 0] * 1) ** 2 + (p[0, 1] * 3) ** 2 + (p[1, 0] * 2 * 30) ** 2).sqrt()
    torch.testing.assert_close(peak_norm(y, weights, 2.0), expected)


def test_rotation_acts_on_each_block_and_centering_on_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    x, rotations = torch.randn(5, 3, 2, 4, generator=generator), torch.randn(3, 4, 4, generator=generator)
    found = rotate(x, rotations)
    for block in range(3):
        torch.testing.assert_close(found[:, block], x[:, block] @ rotations[block])
    torch.testing.assert_close(center(found).mean(-1), torch.zeros(5, 3, 2))


@pytest.mark.parametrize("zero", ["values", "all"])
def test_losses_of_zero_inputs_have_finite_gradients(zero: str) -> None:
    rotations = torch.eye(8).expand(2, 8, 8).clone().requires_grad_()
    x, weights = torch.zeros(1, 4, 2, 1, 8), torch.ones(1, 4)
    other = x if zero == "all" else torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for loss in (head_loss((other, weights), (x, weights), 2.0), input_loss(x, weights, 2.0)):
        (gradient,) = torch.autograd.grad(loss(rotations, slice(None)), rotations)
        assert gradient.isfinite().all()
