"""`hadamard(size)` is orthogonal, flat where a Hadamard matrix is known, and made of small factors."""

import math

import pytest
import torch

from infoquant_vllm.format import FormatError, hadamard, hadamard_factors

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
def test_factors_are_small_and_multiply_to_the_size(size: int) -> None:
    factors = hadamard_factors(size)
    assert math.prod(len(factor) for factor in factors) == size
    assert max(len(factor) for factor in factors) <= 256


def test_odd_factor_too_large_to_be_useful_is_refused() -> None:
    with pytest.raises(FormatError, match="its odd factor 4099"):
        hadamard_factors(4 * 4099)
