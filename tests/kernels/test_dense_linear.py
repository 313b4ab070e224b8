"""The compiled product with an unquantized matrix: right to the dtype's rounding, the same in any batch."""

from collections.abc import Iterator

import pytest
import torch

from infoquant_vllm.kernels.cpu import kernels as compiled
from tests.common import oracles
from tests.common.libraries import RUNNABLE, library


@pytest.fixture(autouse=True, scope="module", params=RUNNABLE)
def _library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each library in turn."""
    with library(request.param):
        yield


@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9])
@pytest.mark.parametrize(("features", "channels"), [(576, 1000), (35, 7), (16, 1), (1536, 33)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_the_oracles_to_a_rounding(rows: int, features: int, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, features).to(dtype), torch.randn(channels, features).to(dtype)
    found, expected = compiled.dense_linear(x, weight), oracles.dense_linear(x, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-3, rtol=1e-2)


def test_a_row_is_the_same_bits_among_few_rows() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(compiled.FEW_ROWS, 576).bfloat16(), torch.randn(500, 576).bfloat16()
    whole = compiled.dense_linear(x, weight)
    for rows in range(1, compiled.FEW_ROWS):
        assert torch.equal(compiled.dense_linear(x[:rows], weight), whole[:rows])
