"""The CPU kernels of the quantised KV cache against the reference."""

import pytest
import torch

from infoquant_vllm.attention import cell_bytes
from infoquant_vllm.kernels.cpu import kv_cache as cpu
from infoquant_vllm.kernels.reference import kv_cache as reference

BLOCK = 16
BATCHES = {
    "decode": ([1, 1, 1], [1, 37, 64]),
    "fresh prefill": ([45], [45]),
    "chunk continuation": ([7], [40]),
    "mixed": ([1, 37, 5, 1], [20, 37, 38, 3]),
    "with an idle row": ([1, 0, 4], [9, 0, 20]),
}


class Batch:
    """Keys, values and queries of some sequences, with their places in a cache of shuffled blocks."""

    def __init__(self, counts: list[int], lens: list[int], heads: int, kv_heads: int, size: int):
        torch.manual_seed(1)
        self.lens, tokens = lens, sum(lens)
        self.query_starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        self.query = torch.randn(sum(counts), heads, size, dtype=torch.bfloat16)
        self.key = torch.randn(tokens, kv_heads, size, dtype=torch.bfloat16) * 2 + 0.5
        self.value = torch.randn(tokens, kv_heads, size, dtype=torch.bfloat16)
        blocks = torch.randperm(64)
        self.block_table = torch.zeros(len(lens), 5, dtype=torch.int32)
        slots, used = [], 0
        for row, length in enumerate(lens):
            count = -(-length // BLOCK)
            self.block_table[row, :count] = blocks[used : used + count]
            slots += [int(self.block_table[row, t // BLOCK]) * BLOCK + t % BLOCK for t in range(length)]
            used += count
        self.slots = torch.tensor(slots)

    def cache(self, num_bits: int) -> torch.Tensor:
        """An empty cache [blocks, kv_heads, block, bytes]."""
        _, kv_heads, size = self.key.shape
        return torch.zeros(64, kv_heads, BLOCK, cell_bytes(size, num_bits), dtype=torch.uint8)


def _clips(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 0.8 + 0.2 * torch.rand(heads, 2), 0.8 + 0.2 * torch.rand(heads, 2)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 5, 123])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("hadamard", [False, True])
def test_stored_cells_are_those_of_the_reference(
    num_bits: int, size: int, tokens: int, kv_heads: int, hadamard: bool
) -> None:
    batch = Batch([1], [tokens] if tokens <= 80 else [80, 43], kv_heads, kv_heads, size)
    batch.slots[::4] = -1
    clips = _clips(kv_heads)
    found, expected = batch.cache(num_bits), batch.cache(num_bits)
    cpu.kv_store(batch.key, batch.value, found, batch.slots, *clips, hadamard, num_bits)
    reference.kv_store(batch.key, batch.value, expected, batch.slots, *clips, hadamard, num_bits)
    assert torch.equal(found, expected)
    assert (found.flatten(1).any(1).sum() > 0) == (tokens > 1)


def test_tokens_without_a_slot_leave_the_cache_alone() -> None:
    batch = Batch([1], [20], 2, 2, 64)
    cache = batch.cache(4).fill_(7)
    cpu.kv_store(batch.key, batch.value, cache, torch.full_like(batch.slots, -1), *_clips(2), False, 4)
    assert (cache == 7).all()


def test_keys_are_stored_alone_as_in_a_batch() -> None:
    batch, clips = Batch([1], [70], 3, 3, 64), _clips(3)
    found, alone = batch.cache(8), batch.cache(8)
    cpu.kv_store(batch.key, batch.value, found, batch.slots, *clips, True, 8)
    for t in range(70):
        cpu.kv_store(batch.key[t : t + 1], batch.value[t : t + 1], alone, batch.slots[t : t + 1], *clips, True, 8)
    assert torch.equal(found, alone)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 128), (2, 1, 80)])
@pytest.mark.parametrize("window", [None, 10])
def test_attention_is_that_of_the_reference(
    name: str, num_bits: int, heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    counts, lens = BATCHES[name]
    batch = Batch(counts, lens, heads, kv_heads, size)
    cache = batch.cache(num_bits)
    reference.kv_store(batch.key, batch.value, cache, batch.slots, *_clips(kv_heads), True, num_bits)
    args = (cache, batch.query_starts, lens, batch.block_table, True, size**-0.5, window, num_bits)
    found, expected = cpu.kv_attention(batch.query, *args), reference.kv_attention(batch.query, *args)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_attention_does_not_depend_on_tiles_chunks_or_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch([60, 1], [60, 33], 9, 3, 64)
    cache = batch.cache(4)
    cpu.kv_store(batch.key, batch.value, cache, batch.slots, *_clips(3), True, 4)
    rest = (True, 0.125, None, 4)
    whole = cpu.kv_attention(batch.query, cache, batch.query_starts, batch.lens, batch.block_table, *rest).bfloat16()
    monkeypatch.setattr(cpu, "SCORE_ELEMENTS", 9 * 60 * 7)  # seven queries at a time
    tiled = cpu.kv_attention(batch.query, cache, batch.query_starts, batch.lens, batch.block_table, *rest)
    assert torch.equal(tiled.bfloat16(), whole)
    for length in range(1, 61):  # one token after the other
        row = cpu.kv_attention(batch.query[length - 1 : length], cache, [0, 1], [length], batch.block_table[:1], *rest)
        assert torch.equal(row.bfloat16(), whole[length - 1 : length])


def test_cells_beyond_a_sequence_do_not_matter() -> None:
    batch = Batch([1, 1], [5, 40], 4, 2, 64)
    cache = batch.cache(4)
    cpu.kv_store(batch.key, batch.value, cache, batch.slots, *_clips(2), True, 4)
    args = (batch.query_starts, batch.lens, batch.block_table, True, 0.125, None, 4)
    before = cpu.kv_attention(batch.query, cache, *args)
    cache[int(batch.block_table[0, 0]), :, 5:] = 255  # float16 NaN among the parameters
    cache[0] = 255
    assert torch.equal(cpu.kv_attention(batch.query, cache, *args), before)
