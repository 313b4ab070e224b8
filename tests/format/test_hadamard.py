"""`hadamard(size)` is orthogonal, flat where a Hadamard matrix is known, and applied as the format says."""

import math

import pytest
import torch

from infoquant_vllm.format import FormatError, apply_hadamard, hadamard, hadamard_dense

SIZES = (1, 2, 3, 7, 12, 20, 28, 36, 52, 64, 96, 128, 172, 576, 768, 896, 1376, 1536)
FLAT_SIZES = (2, 4, 8, 12, 20, 24, 28, 36, 40, 64, 128, 576, 1536)


@pytest.mark.parametrize("size", SIZES)
def test_matrix_is_orthogonal(size: int) -> None:
    matrix = hadamard(size)
    assert matrix.shape == (size, size)
    assert (matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("size", FLAT_SIZES)
def test_entries_are_equal_in_magnitude_where_paley_or_sylvester_give_one(size: int) -> None:
    assert (hadamard(size).abs() - 1 / math.sqrt(size)).abs().max() < 1e-12


@pytest.mark.parametrize("size", [*SIZES, 4096, 5632, 8192, 11008, 13824, 14336, 28672])
def test_dense_factor_is_small_and_leaves_a_power_of_two(size: int) -> None:
    factor = hadamard_dense(size)
    order = len(factor)
    assert order <= 256
    assert (size // order).bit_count() == 1
    assert order % 2 == 1 or bool((factor.abs() == 1).all())  # what kernels tell Paley's matrices by


@pytest.mark.parametrize("size", SIZES)
def test_applying_is_the_product_with_the_matrix(size: int) -> None:
    x = torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(apply_hadamard(x), x @ hadamard(size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [8, 12, 43 * 4, 1536])
def test_roundings_come_in_the_stated_order(size: int) -> None:
    """As the docstring of `apply_hadamard` says it, a number at a time."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(1))
    factor = hadamard_dense(size).float().numpy()
    y, n = x.clone().numpy().reshape(len(factor), -1), size // len(factor)
    for h in (2**step for step in range(n.bit_length() - 1)):
        for i in (i for i in range(n) if not i & h):
            a, b = y[:, i].copy(), y[:, i + h].copy()
            y[:, i], y[:, i + h] = a + b, a - b
    total = y if len(factor) == 1 else 0 * y
    for j in range(len(factor) if len(factor) > 1 else 0):
        for i in range(len(factor)):
            total[j] += y[i] * factor[i, j]
    expected = torch.from_numpy(total).flatten() * torch.tensor(1 / math.sqrt(size), dtype=torch.float32)
    assert torch.equal(apply_hadamard(x), expected)


@pytest.mark.parametrize("size", [64, 80, 1536])
def test_a_row_is_the_same_bits_in_any_batch(size: int) -> None:
    x = torch.randn(123, size, generator=torch.Generator().manual_seed(2))
    whole = apply_hadamard(x)
    for rows in (1, 2, 42, 43):
        assert torch.equal(apply_hadamard(x[:rows]), whole[:rows])


def test_odd_factor_too_large_to_be_useful_is_refused() -> None:
    with pytest.raises(FormatError, match="its odd factor 4099"):
        hadamard_dense(4 * 4099)
