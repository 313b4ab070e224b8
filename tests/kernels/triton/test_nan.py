"""NaN and infinities in activations: they show in their own token as the reference has it, and in no other."""

from typing import Any

import pytest
import torch

from infoquant_vllm.format import pack_codes
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from tests.common import oracles
from tests.common.interpreted import attention, kv_store, linear
from tests.kernels.test_kv_cache import Batch
from tests.kernels.triton.test_attention import Decoding
from tests.kernels.triton.test_rotate_quantize import transform


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize(("num_bits", "groups"), [(4, 1), (4, 3), (8, 1), (16, 1)])
@pytest.mark.parametrize("kind", ["none", "hadamard 128", "hadamard 384", "kronecker 12", "blocks 64", "blocks 192"])
def test_rows_with_nan_or_infinity_come_out_as_the_reference_has_them(
    kind: str, num_bits: int, groups: int, tokens: int
) -> None:
    torch.manual_seed(0)
    matrices, hadamard = transform(kind, 384)
    weight = PackedWeight(pack_codes(torch.randint(-8, 8, (32, 384)), 4, True), torch.rand(32, 1), None, None)
    clip = None if num_bits == 16 else torch.ones(groups, 2)
    x = torch.randn(tokens, 384).bfloat16()
    clean = x.clone()
    x[1, 5], x[3, 383] = torch.nan, torch.inf
    inputs, prepared = InputQuant(matrices, hadamard, clip, num_bits, False), linear.prepare_linear(weight, 4, 1)
    ours = inputs._replace(matrices=linear.prepare_matrices(matrices, hadamard))
    found, untouched = (linear.linear(rows, ours, prepared, None) for rows in (x, clean))
    expected = oracles.linear(x, inputs, weight, None)
    for out in (found, expected):
        assert out[1].isnan().all()
        assert not out[3].isfinite().any()
    others = torch.arange(tokens) % 4 != 1
    others[3] = False
    others[5:] = True
    assert torch.equal(found[others], untouched[others])


@pytest.mark.parametrize("num_bits", [(4, 4), (8, 8)])
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_keys_and_values_that_are_no_numbers_are_stored_as_the_reference_stores_them(
    num_bits: tuple[int, int], hadamard: bool, value: float
) -> None:
    batch = Batch([1], [24], 2, 2, 64, num_bits)
    batch.key[3, 0, 7], batch.value[5, 1, 63] = value, value
    found, expected = (
        oracles.kv_read(batch.store(kernels, hadamard), batch.block_table[0, :2], 64, num_bits)
        for kernels in (kv_store, oracles)
    )
    torch.testing.assert_close(found[2][..., :24], expected[2][..., :24], rtol=0, atol=0, equal_nan=True)
    for codes, right, token in ((found[0], expected[0], 3), (found[1], expected[1], 5)):
        same = (codes == right).all(-1)[:, :24]
        same[:, token] = True  # codes of a row without a scale mean nothing
        assert same.all()


@pytest.mark.parametrize(("counts", "ours"), [([1, 1], Decoding()), ([4, 3], Decoding(4)), ([9, 4], attention)])
def test_attention_of_queries_and_to_keys_that_are_no_numbers_is_nan(counts: list[int], ours: Any) -> None:
    batch = Batch(counts, [70, 40], 4, 2, 64, dtype=torch.float32)
    cache = batch.store(oracles)
    clean = batch.attend(ours, cache)
    batch.query[-1, 2, 9] = torch.nan
    found, expected = (batch.attend(kernels, cache) for kernels in (ours, oracles))
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[-1, 2].isnan().all()
    assert torch.equal(found[~found.isnan()], clean[~found.isnan()])
    batch.key[0, 1, 3] = torch.nan  # a token that every query of the first sequence sees
    cache = batch.store(oracles)
    found, expected = (batch.attend(kernels, cache) for kernels in (ours, oracles))
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[: counts[0], 2:].isnan().all()
    assert not found[: counts[0], :2].isnan().any()
