"""Attention in Triton under the interpreter, against the reference; and what its rows do not depend on."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from infoquant_vllm.kernels.operands import KVScheme, ScoreParams, Sequences
from infoquant_vllm.kernels.torch import kv_cache as cpu
from tests.common import oracles
from tests.common.interpreted import attention, decode, tiles
from tests.kernels.test_kv_cache import BATCHES, BITS, Batch

TOLERANCE = 5e-4
"""Of the greatest output: both round weights to 32512 steps of a chunk's greatest, but each its own chunks'."""


@pytest.fixture(autouse=True)
def _few_parts_in_memory_that_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "SEQUENCE_SPLITS", 8)  # empty ones cost time here
    torch.use_deterministic_algorithms(True)  # which also fills what is allocated
    yield
    torch.use_deterministic_algorithms(False)


class Decoding:
    """`kv_decode` with what an engine of up to `queries` queries a sequence gives it, as `Batch.attend` calls it."""

    def __init__(self, queries: int = 1):
        self.queries = queries

    def kv_attention(
        self, query: torch.Tensor, cache: torch.Tensor, sequences: Sequences, score: ScoreParams, *rest: Any
    ) -> None:
        heads, context = (query.shape[1], cache.shape[1], query.shape[2]), sequences.block_table.shape[1]
        bounds = len(sequences.seq_lens), self.queries, context * cache.shape[2]
        shapes = decode.decode_scratch(*heads, score.window, *bounds, query.device)
        scratch = [torch.full(shape, torch.nan) for shape in shapes]
        decode.kv_decode(query, cache, sequences, score, *rest, self.queries, scratch)


def kernels_for(counts: list[int]) -> list[Any]:
    """Those that serve sequences of so many queries."""
    return [attention] + ([Decoding(max(counts))] if max(counts) <= 9 else [])


def assert_like_the_reference(batch: Batch, window: int | None = None, **other: Any) -> None:
    cache = batch.store(cpu)
    expected = batch.attend(cpu, cache, window, **other).float()
    for kernels in kernels_for(batch.query_starts.diff().tolist()):
        found = batch.attend(kernels, cache, window, **other).float()
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("window", [None, 20])
def test_attention_is_that_of_the_reference(name: str, window: int | None) -> None:
    assert_like_the_reference(Batch(*BATCHES[name], 3, 1, 64, dtype=torch.float32), window)


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (90, None), (None, 2.0)])
def test_a_few_queries_of_a_sequence_are_those_of_the_reference(
    queries: int, window: int | None, soft_cap: float | None
) -> None:
    """Among sequences with fewer and with none, whose contexts end before, at and after the end of a part."""
    batch = Batch([queries, 0, 1, queries], [128 + queries // 2, 0, 129, 1024 + queries // 2], 3, 1, 64)
    batch.query, batch.key = batch.query.float() / 4, batch.key.float()
    cache = batch.store(cpu)
    expected = batch.attend(oracles, cache, window, soft_cap).float()
    found = batch.attend(Decoding(queries), cache, window, soft_cap).float()
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("window", [None, 250])
def test_a_query_is_the_same_bits_however_many_there_are_of_its_sequence(window: int | None) -> None:
    """Through positions where parts are cut elsewhere: 1,024 tokens are 8 parts of a chunk, one more 5 of two."""
    batch = Batch([8, 8], [1028, 131], 1, 1, 64, dtype=torch.float32)
    cache = batch.store(cpu)
    together = batch.attend(Decoding(8), cache, window)
    for first in range(0, 8, 3):
        some, starts = slice(first, min(first + 3, 8)), torch.tensor([0, min(3, 8 - first)], dtype=torch.int32)
        part = {"query": batch.query[some], "starts": starts, "table": batch.block_table[:1]}
        part["lens"] = torch.tensor([1020 + some.stop], dtype=torch.int32)
        assert torch.equal(batch.attend(Decoding(8), cache, window, **part), together[some])


@pytest.mark.parametrize("counts", [[1, 1], [4, 2]])
def test_rows_are_the_same_bits_by_one_program_or_many(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(counts, [900, 300], 4, 2, 64, dtype=torch.float32)
    cache = batch.store(cpu)
    monkeypatch.setattr(tiles, "PROGRAMS_PER_SM", 1)
    found = []
    for processors in (16, 8, 4):  # to a program one part, two, all four
        monkeypatch.setattr(tiles, "multiprocessors", lambda device, count=processors: count)
        assert tiles.decode_programs(2, 2, 4, processors) == processors // 4
        found.append(batch.attend(Decoding(4), cache))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("num_bits", BITS[1:])
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_bits_of_keys_and_of_values_are_their_own(num_bits: tuple[int, int], name: str) -> None:
    assert_like_the_reference(Batch(*BATCHES[name], 2, 1, 64, num_bits, dtype=torch.float32))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "block"), [(2, 2, 64, 48), (3, 1, 96, 32), (8, 1, 128, 64), (2, 1, 256, 128)]
)
@pytest.mark.parametrize("counts", [[1, 1], [9, 1]])
def test_head_sizes_groups_and_blocks_are_those_of_the_reference(
    heads: int, kv_heads: int, size: int, block: int, counts: list[int]
) -> None:
    assert_like_the_reference(Batch(counts, [150, 17], heads, kv_heads, size, block=block, dtype=torch.float32))


@pytest.mark.parametrize("window", [1, 64, 65, 68, 73, 128])
@pytest.mark.parametrize("queries", [1, 70])
def test_windows_begin_where_they_should(window: int, queries: int) -> None:
    batch = Batch([queries], [200], 1, 1, 64, dtype=torch.float32)
    batch.query /= 16  # so that every token counts
    assert_like_the_reference(batch, window)


@pytest.mark.parametrize(("length", "queries"), [(127, 1), (128, 1), (129, 1), (1025, 1), (127, 2), (128, 2), (129, 2)])
def test_a_context_ends_where_it_should(length: int, queries: int) -> None:
    batch = Batch([queries], [length], 1, 1, 64, dtype=torch.float32)
    batch.query /= 16  # so that every token counts
    assert_like_the_reference(batch)


@pytest.mark.parametrize("counts", [[1, 1], [9, 1]])
@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_caps_bound_scores_as_the_reference_does(counts: list[int], soft_cap: float) -> None:
    batch = Batch(counts, [150, 17], 2, 1, 64, dtype=torch.float32)
    batch.query *= 8  # scores are beyond the smaller bound, and far enough from the greater one to be bent a little
    cache = batch.store(cpu)
    expected, free = batch.attend(oracles, cache, soft_cap=soft_cap), batch.attend(oracles, cache)
    for kernels in kernels_for(counts):
        found = batch.attend(kernels, cache, soft_cap=soft_cap)
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert (free - expected).abs().max() > 10 * TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("heads", [12, 40])
def test_more_heads_to_a_kv_head_than_a_tile_has_rows(heads: int) -> None:
    assert_like_the_reference(Batch([1], [70], heads, 1, 64, dtype=torch.float32))
    assert_like_the_reference(Batch([3], [70], heads, 1, 64, dtype=torch.float32))


@pytest.mark.parametrize("kernels", [attention, Decoding(4)])
def test_queries_and_outputs_may_be_parts_of_wider_tensors(kernels: Any) -> None:
    counts = [1, 4]
    batch = Batch(counts, [30, 20], 4, 2, 96)
    cache, tokens = batch.store(cpu), sum(counts)
    expected = batch.attend(kernels, cache)
    query, out = torch.zeros(tokens, 9, 96).bfloat16(), torch.ones(4, 7, 96).bfloat16().transpose(0, 1)
    query[:, 2:6] = batch.query
    rest = (batch.sequences, ScoreParams(96**-0.5), KVScheme((4, 4), hadamard=True))
    kernels.kv_attention(query[:, 2:6], cache, *rest, out[1 : tokens + 1])
    assert torch.equal(out[1 : tokens + 1], expected)
    assert (out[0] == 1).all()
    assert (out[tokens + 1 :] == 1).all()


@pytest.mark.parametrize("counts", [[1, 1, 0, 0], [4, 2, 0, 0]])
def test_the_padding_of_a_captured_batch_is_left_alone(counts: list[int]) -> None:
    """Rows of no sequence, and sequences of no rows and no tokens, whose block table holds what was there before."""
    batch = Batch(counts, [144, 32, 0, 0], 2, 1, 64)
    cache, tokens = batch.store(cpu), sum(counts)
    expected = batch.attend(cpu, cache)
    for row, used in enumerate((9, 2, 0, 0)):
        batch.block_table[row, used:] = 10**9
    query, out = torch.cat((batch.query, batch.query[:2] * torch.nan)), torch.full((tokens + 2, 2, 64), 7.0)
    rest = (batch.sequences, ScoreParams(64**-0.5), KVScheme((4, 4), hadamard=True))
    Decoding(max(counts)).kv_attention(query, cache, *rest, out)
    assert (out[:tokens] - expected).abs().max() <= 0.01 * expected.abs().max()  # bf16, which the interpreter cuts off
    assert (out[tokens:] == 7).all()


@pytest.mark.parametrize("counts", [[3, 1, 0, 0], [4, 0, 0, 0], [0, 2, 2, 0]])
def test_a_graph_serves_every_batch_of_as_many_tokens_and_sequences(counts: list[int]) -> None:
    """Whatever the lengths on the host: vLLM may share out queries on the GPU."""
    batch = Batch(counts, [max(count, 1) * 40 for count in counts], 2, 1, 64, dtype=torch.float32)
    assert_like_the_reference(batch)


def test_the_last_sequences_of_a_batch_are_served_alone() -> None:
    batch = Batch([1, 2, 37, 5], [20, 130, 37, 138], 2, 1, 64, dtype=torch.float32)
    cache = batch.store(cpu)
    expected = batch.attend(cpu, cache)
    last = {"query": batch.query[3:], "starts": batch.query_starts[2:], "lens": batch.lens[2:]}
    found = batch.attend(attention, cache, table=batch.block_table[2:], **last)
    assert (found - expected[3:]).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_decoding_row_is_the_same_bits_in_every_batch() -> None:
    batch = Batch([1] * 3, [300, 20, 140], 2, 1, 64, dtype=torch.float32)
    cache = batch.store(cpu)
    together = batch.attend(Decoding(), cache)
    for row in range(3):
        part = {"query": batch.query[row : row + 1], "starts": torch.tensor([0, 1], dtype=torch.int32)}
        part |= {"lens": batch.lens[row : row + 1], "table": batch.block_table[row : row + 1]}
        assert torch.equal(batch.attend(Decoding(), cache, **part), together[row : row + 1])


@pytest.mark.parametrize("window", [None, 90])
def test_a_prompt_is_the_same_bits_in_every_cut(window: int | None) -> None:
    batch = Batch([150], [150], 2, 1, 64, dtype=torch.float32)
    cache = batch.store(cpu)
    whole = batch.attend(attention, cache, window)
    ends = [2, 37, 64, 130, 150]
    for first, last in zip([0, *ends], ends, strict=False):
        starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, last - first], [last]))
        part = {"query": batch.query[first:last], "starts": starts, "lens": lens}
        assert torch.equal(batch.attend(attention, cache, window, **part), whole[first:last])


def test_huge_scores_and_queries_of_zeros_are_those_of_the_reference() -> None:
    batch = Batch([3, 1], [140, 300], 2, 1, 64, dtype=torch.float32)
    batch.query[0], batch.query[1] = 0, batch.query[1] * 1000
    assert_like_the_reference(batch)


@pytest.mark.parametrize("queries", [1, 4])
def test_many_small_weights_beside_a_great_one_are_not_lost(queries: int) -> None:
    """As in real models, whose first token takes most of the weight; against float64 over the same codes."""
    batch = Batch([queries], [1024], 1, 1, 64, dtype=torch.float32)
    batch.query[:] = batch.query[0, 0]
    batch.key[:] *= 0.1
    batch.key[0], batch.value[0] = 9 * batch.query[0, 0] / batch.query[0, 0].norm(), batch.value[0] / 16
    cache = batch.store(cpu, hadamard=False, offset=False)
    keys, values, params = oracles.kv_read(cache, batch.block_table[0], 64, (4, 4))
    keys, values = (
        (codes[0, :1024] * params[i, 0, :1024, None].double() + params[i + 1, 0, :1024, None].double())
        for i, codes in ((0, keys), (2, values))
    )
    weights = (keys @ batch.query[0, 0].double() * 64**-0.5).softmax(-1)
    assert weights[0] > 0.5 > 100 * weights[1:].max()
    out = torch.empty_like(batch.query)
    rest = (batch.sequences, ScoreParams(64**-0.5), KVScheme((4, 4), hadamard=False), out)
    expected = weights @ values
    for kernels in kernels_for([queries]):
        kernels.kv_attention(batch.query, cache, *rest)
        assert (out[-1, 0] - expected).norm() / expected.norm() < 2e-4
