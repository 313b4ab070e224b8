"""The Triton kernels of the quantized KV cache under the interpreter, against the reference."""

import pytest
import torch

from tests.common import oracles
from tests.common.interpreted import kv_store
from tests.kernels.test_kv_cache import BITS, Batch


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize(("size", "block"), [(64, 16), (96, 64), (128, 128)])
@pytest.mark.parametrize("keys", ["rotated, less an offset", "as they are"])
def test_stored_cells_are_those_of_the_reference(num_bits: tuple[int, int], size: int, block: int, keys: str) -> None:
    batch, changed = Batch([1], [21], 3, 3, size, num_bits, block), keys != "as they are"
    batch.slots[::4] = -1
    found = batch.store(kv_store, changed, changed)
    assert torch.equal(found, batch.store(oracles, changed, changed))
    assert not torch.equal(found, batch.empty_cache())


@pytest.mark.parametrize("num_bits", [(4, 4), (8, 4)])
@pytest.mark.parametrize("size", [64, 80])
def test_keys_with_feedback_are_stored_as_in_the_reference(num_bits: tuple[int, int], size: int) -> None:
    batch = Batch([1], [5], 2, 2, size, num_bits)
    batch.feedback *= 0.1
    batch.slots[::4] = -1
    found = batch.store(kv_store, feedback=True)
    assert torch.equal(found, batch.store(oracles, feedback=True))
    assert not torch.equal(found, batch.store(kv_store))


@pytest.mark.parametrize("size", [32, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_sizes_and_dtypes_are_stored_alike(size: int, dtype: torch.dtype) -> None:
    batch = Batch([1], [9], 1, 1, size, dtype=dtype)
    assert torch.equal(batch.store(kv_store), batch.store(oracles))


def test_rows_of_a_wider_tensor_are_stored_where_they_are_and_padding_is_left_out() -> None:
    batch = Batch([1], [20], 2, 2, 64)
    batch.slots = batch.slots[:17]  # vLLM may hand on more rows than there are slots
    expected = batch.store(oracles)
    joined = torch.cat((batch.key, batch.value), 1)
    batch.key, batch.value = joined[:, :2], joined[:, 2:]
    assert torch.equal(batch.store(kv_store), expected)
    batch.key, batch.value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (batch.key, batch.value))
    assert torch.equal(batch.store(kv_store), expected)
    batch.slots = batch.slots[:0]
    assert torch.equal(batch.store(kv_store), batch.empty_cache())


@pytest.mark.parametrize("values", ["zeros", "huge", "tiny"])
def test_ranges_at_their_limits_are_stored_alike(values: str) -> None:
    batch = Batch([1], [8], 1, 1, 64, dtype=torch.float32)
    factor = {"zeros": 0.0, "huge": 1e9, "tiny": 1e-9}[values]
    batch.key, batch.value = batch.key * factor, batch.value * factor
    found, expected = (
        oracles.kv_read(batch.store(kernels, offset=False), batch.block_table[0, :1], 64, (4, 4))
        for kernels in (kv_store, oracles)
    )
    # As numbers: a zero may be -0, whose sign no torch and no GPU promises.
    assert all(torch.equal(a[..., :8, :], b[..., :8, :]) for a, b in zip(found[:2], expected[:2], strict=True))
    assert torch.equal(found[2][..., :8], expected[2][..., :8])
