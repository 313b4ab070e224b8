"""Bytes that come from a product as the first operand of the next, which Triton once got wrong (triton issue 3580)."""

import pytest
import torch

from tests.common.interpreted import chained


@pytest.mark.parametrize("rows", [8, 16, 32, 64])
@pytest.mark.parametrize("middle", [64, 128])
@pytest.mark.parametrize("columns", [32, 64])
def test_bytes_of_a_product_are_multiplied_exactly(rows: int, middle: int, columns: int) -> None:
    torch.manual_seed(rows)
    a, b, c = (
        torch.randint(-128, 128, shape).to(torch.int8) for shape in ((rows, 64), (64, middle), (middle, columns))
    )
    expected = ((a.long() @ b.long()) & 0x7EFF) @ c.long()
    assert torch.equal(chained.chained(a, b, c), expected.int())
