"""The kernels of the quantized KV cache, compiled and in torch: the oracle's bits."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from infoquant_vllm.format import kv_bytes_per_token_head
from infoquant_vllm.kernels.cpu import kernels as native
from infoquant_vllm.kernels.operands import KVCalibration, KVScheme, ScoreParams, Sequences
from infoquant_vllm.kernels.torch import kv_cache as cpu
from tests.common import oracles
from tests.common.libraries import RUNNABLE, library

BATCHES = {
    "decode": ([1] * 6, [1, 15, 16, 17, 128, 300]),
    "long decode": ([1], [1000]),
    "fresh prefill": ([150], [150]),
    "chunk continuation": ([7], [140]),
    "mixed": ([1, 37, 5, 1], [20, 37, 138, 3]),
    "with an idle row": ([1, 0, 4], [9, 0, 20]),
}
BITS = [(4, 4), (8, 8), (8, 4), (4, 8)]
"""Of keys and of values."""


@pytest.fixture(scope="module", params=["torch", *RUNNABLE])
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Yield those in torch, and those of each library in turn."""
    if request.param == "torch":
        yield cpu
        return
    with library(request.param):
        yield native


class Batch:
    """Keys, values and queries of some sequences, with their places in a cache of shuffled blocks."""

    def __init__(
        self,
        counts: list[int],
        lens: list[int],
        heads: int = 4,
        kv_heads: int = 2,
        size: int = 64,
        num_bits: tuple[int, int] = (4, 4),
        block: int = 16,
        dtype: torch.dtype = torch.bfloat16,
    ):
        generator = torch.Generator().manual_seed(1)
        self.num_bits, self.block, tokens = num_bits, block, sum(lens)
        self.query_starts = torch.tensor([0, *counts]).cumsum(0).int()
        self.lens = torch.tensor(lens, dtype=torch.int32)
        self.query = (2 * torch.randn(sum(counts), heads, size, generator=generator)).to(dtype)
        self.key = (2 * torch.randn(tokens, kv_heads, size, generator=generator) + 0.5).to(dtype)
        self.value = torch.randn(tokens, kv_heads, size, generator=generator).to(dtype)
        self.clips = tuple(0.8 + 0.2 * torch.rand(2, kv_heads, 2, generator=generator))
        self.key_mean = torch.randn(kv_heads, size, generator=torch.Generator().manual_seed(2))
        self.feedback = 0.5 * torch.randn(kv_heads, size, size, generator=torch.Generator().manual_seed(3))
        used = [-(-length // block) for length in lens]
        self.blocks = torch.randperm(sum(used) + 2, generator=generator)
        self.block_table = torch.zeros(len(lens), max(used) + 1, dtype=torch.int32)
        slots, first = [], 0
        for row, length in enumerate(lens):
            self.block_table[row, : used[row]] = self.blocks[first : first + used[row]]
            slots += [int(self.block_table[row, t // block]) * block + t % block for t in range(length)]
            first += used[row]
        self.slots = torch.tensor(slots)

    def empty_cache(self) -> torch.Tensor:
        """A cache [blocks, kv_heads, block, bytes] of what used to be there: NaN as parameters."""
        _, kv_heads, size = self.key.shape
        shape = (len(self.blocks), kv_heads, self.block, kv_bytes_per_token_head(size, self.num_bits))
        return torch.full(shape, 255, dtype=torch.uint8)

    @property
    def sequences(self) -> Sequences:
        """The sequences as the kernels take them."""
        return Sequences(self.query_starts, self.lens, self.block_table)

    def store(
        self, kernels: ModuleType, hadamard: bool = True, offset: bool = True, feedback: bool = False
    ) -> torch.Tensor:
        """The cache after all tokens are stored."""
        given = self.key_mean if offset else None, self.feedback if feedback else None
        cache, calibration = self.empty_cache(), KVCalibration(*self.clips, *given)
        scheme = KVScheme(self.num_bits, hadamard)
        kernels.kv_store(self.key, self.value, cache, self.slots, calibration, scheme)
        return cache

    def attend(
        self,
        kernels: ModuleType,
        cache: torch.Tensor,
        window: int | None = None,
        soft_cap: float | None = None,
        **other: Any,
    ) -> torch.Tensor:
        """Attention of the batch, or of one that differs from it."""
        batch = {"query": self.query, "starts": self.query_starts, "lens": self.lens, "table": self.block_table} | other
        out = torch.empty_like(batch["query"])
        scale = self.query.shape[2] ** -0.5
        sequences = Sequences(batch["starts"], batch["lens"], batch["table"])
        score, scheme = ScoreParams(scale, window, soft_cap), KVScheme(self.num_bits, hadamard=True)
        kernels.kv_attention(batch["query"], cache, sequences, score, scheme, out)
        return out


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("size", [64, 80, 96, 120, 128, 256])
@pytest.mark.parametrize("tokens", [1, 45])
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_stored_bytes_are_the_oracles(
    kernels: ModuleType, num_bits: tuple[int, int], size: int, tokens: int, hadamard: bool, offset: bool
) -> None:
    batch = Batch([1], [tokens], 3, 3, size, num_bits)
    batch.slots[::4] = -1
    found = batch.store(kernels, hadamard, offset)
    assert torch.equal(found, batch.store(oracles, hadamard, offset))
    assert tokens == 1 or not torch.equal(found, batch.store(kernels, hadamard, not offset))
    assert torch.equal(found, batch.empty_cache()) == (tokens == 1)


@pytest.mark.parametrize("key_bits", [4, 8])
@pytest.mark.parametrize("size", [64, 80, 120])
@pytest.mark.parametrize("hadamard", [False, True])
def test_keys_stored_with_feedback_are_the_oracles(
    kernels: ModuleType, key_bits: int, size: int, hadamard: bool
) -> None:
    batch = Batch([1], [53], 2, 2, size, (key_bits, 4))  # the native kernel takes 16 tokens at a time
    batch.feedback *= 0.1
    batch.slots[::4] = batch.slots[16:32] = -1
    batch.key[9] = 0
    found = batch.store(kernels, hadamard, feedback=True)
    assert torch.equal(found, batch.store(oracles, hadamard, feedback=True))
    assert not torch.equal(found, batch.store(kernels, hadamard))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_a_wider_tensor_are_stored_where_they_are(kernels: ModuleType, dtype: torch.dtype) -> None:
    batch = Batch([1], [40], 2, 2, 64, dtype=dtype)
    expected = batch.store(oracles)
    joined = torch.cat((batch.key, batch.value), 1)
    batch.key, batch.value = joined[:, :2], joined[:, 2:]
    assert not batch.key.is_contiguous()
    assert torch.equal(batch.store(kernels), expected)


def test_keys_are_stored_alone_as_in_a_batch(kernels: ModuleType) -> None:
    batch = Batch([1], [70], 3, 3)
    alone = batch.empty_cache()
    for t in range(70):
        one = slice(t, t + 1)
        rows, calibration = (batch.key[one], batch.value[one]), KVCalibration(*batch.clips, batch.key_mean)
        kernels.kv_store(*rows, alone, batch.slots[one], calibration, KVScheme((4, 4), hadamard=True))
    assert torch.equal(batch.store(kernels), alone)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (7, 1, 80)])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_has_the_oracles_bits(
    kernels: ModuleType, name: str, num_bits: tuple[int, int], heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    batch = Batch(*BATCHES[name], heads, kv_heads, size, num_bits)
    cache = batch.store(cpu)
    assert torch.equal(batch.attend(kernels, cache, window), batch.attend(oracles, cache, window))


@pytest.mark.parametrize(("size", "block"), [(96, 32), (120, 16), (128, 128), (256, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_head_sizes_blocks_and_dtypes_have_the_oracles_bits(
    kernels: ModuleType, size: int, block: int, dtype: torch.dtype
) -> None:
    batch = Batch([1, 30, 1], [300, 30, 17], 4, 2, size, block=block, dtype=dtype)
    cache = batch.store(cpu)
    assert torch.equal(batch.attend(kernels, cache), batch.attend(oracles, cache))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 150])
def test_a_row_does_not_depend_on_chunks_the_batch_or_the_split(
    kernels: ModuleType, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch([600, 1], [600, 333], 9, 3)
    cache = batch.store(kernels)
    whole = batch.attend(kernels, cache, window)
    monkeypatch.setattr(cpu, "SCORE_ELEMENTS", 9 * 640 * 70)  # seventy queries at a time
    assert torch.equal(batch.attend(kernels, cache, window), whole)
    ends = [1, 130, 257, 258, 599, 600]
    for first, last in zip([0, *ends], ends, strict=False):
        starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, last - first], [last]))
        part = {"query": batch.query[first:last], "starts": starts, "lens": lens, "table": batch.block_table[:1]}
        assert torch.equal(batch.attend(kernels, cache, window, **part), whole[first:last])


@pytest.mark.parametrize("size", [72, 256])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("soft_cap", [0.1, 5.0, 50.0])
def test_soft_caps_have_the_oracles_bits(kernels: ModuleType, size: int, window: int | None, soft_cap: float) -> None:
    batch = Batch([1, 30, 3], [300, 30, 17], 4, 2, size)
    cache = batch.store(cpu)
    expected = batch.attend(oracles, cache, window, soft_cap)
    assert torch.equal(batch.attend(kernels, cache, window, soft_cap), expected)
    assert not torch.equal(batch.attend(kernels, cache, window), expected)


def test_a_soft_cap_does_not_hide_a_query_of_nan(kernels: ModuleType) -> None:
    batch = Batch([2, 20], [40, 20])
    batch.query[1], batch.query[5] = float("nan"), float("nan")
    found = batch.attend(kernels, batch.store(cpu), soft_cap=5.0)
    assert torch.equal(found.isnan().any(-1).any(-1), batch.query.isnan().any(-1).any(-1))


def test_huge_scores_and_queries_of_zeros_have_the_oracles_bits(kernels: ModuleType) -> None:
    batch = Batch([3, 1], [140, 300])
    batch.query[0], batch.query[1] = 0, batch.query[1] * 1000
    cache = batch.store(cpu)
    found = batch.attend(kernels, cache)
    assert torch.equal(found, batch.attend(oracles, cache))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("sink", [0.0, 6.0, 12.0])
def test_rounding_to_int16_costs_nothing_beside_the_codes(sink: float) -> None:
    """Against float64 over the same codes; with a sink, most of the weight is on the first token, as in real models."""
    batch = Batch([4], [4096], 2, 1, 128, dtype=torch.float32)
    batch.key[0], batch.value[0] = sink * batch.query[0, 0] / batch.query[0, 0].norm(), batch.value[0] / 16
    batch.query[:] = batch.query[0, 0]
    cache = batch.store(cpu, hadamard=False, offset=False)
    keys, values, params = oracles.kv_read(cache, batch.block_table[0], 128, (4, 4))
    keys, values = (
        (codes[0, :4096] * params[i, 0, :4096, None].double() + params[i + 1, 0, :4096, None].double())
        for i, codes in ((0, keys), (2, values))
    )
    weights = (batch.query[3, 0].double() @ keys.T * 128**-0.5).softmax(-1)
    out = torch.empty_like(batch.query)
    cpu.kv_attention(batch.query, cache, batch.sequences, ScoreParams(128**-0.5), KVScheme((4, 4), hadamard=False), out)
    expected = weights @ values
    assert (out[3, 0] - expected).norm() / expected.norm() < 1e-3  # that of the codes is 0.1
