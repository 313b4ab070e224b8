"""Codes survive packing; codes that do not fit are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infoquant_vllm.format import FormatError, pack_codes, unpack_codes

BITS = st.sampled_from((4, 8))


@settings(deadline=None)
@given(BITS, st.booleans(), st.integers(1, 7), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_codes_round_trip(num_bits: int, signed: bool, rows: int, pairs: int, seed: int) -> None:
    low = -(2 ** (num_bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, low + 2**num_bits, (rows, 2 * pairs), generator=generator)
    packed = pack_codes(codes, num_bits, signed)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, 2 * pairs * num_bits // 8)
    assert torch.equal(unpack_codes(packed, num_bits, signed).long(), codes)


@settings(deadline=None)
@given(BITS, st.booleans(), st.integers(0, 2**32 - 1))
def test_bytes_round_trip(num_bits: int, signed: bool, seed: int) -> None:
    packed = torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(pack_codes(unpack_codes(packed, num_bits, signed), num_bits, signed), packed)


def test_even_index_is_the_low_nibble() -> None:
    assert pack_codes(torch.tensor([[1, 2]]), 4, signed=False).item() == 0x21
    assert pack_codes(torch.tensor([[-8, -1]]), 4, signed=True).item() == 0xF8


@pytest.mark.parametrize(("code", "num_bits", "signed"), [(8, 4, True), (-9, 4, True), (16, 4, False), (-1, 8, False)])
def test_code_that_does_not_fit_is_refused_with_its_value(code: int, num_bits: int, signed: bool) -> None:
    with pytest.raises(FormatError, match=rf"{code}.* do not fit in {num_bits} "):
        pack_codes(torch.tensor([[0, code]]), num_bits, signed)


def test_odd_number_of_nibbles_is_refused() -> None:
    with pytest.raises(FormatError, match="3 codes per row"):
        pack_codes(torch.zeros(1, 3), 4, signed=True)
