"""The kernels of the quantized KV cache: their calls for a model, and how much of them there is to do."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import triton

from benchmarks.static.cases import MODELS, Case, Entry, Model
from benchmarks.static.launches import Launch
from infoquant_vllm.format import kv_bytes_per_token_head
from infoquant_vllm.kernels.operands import KVCalibration, KVScheme, ScoreParams, Sequences
from infoquant_vllm.kernels.triton.attention import kv_attention
from infoquant_vllm.kernels.triton.decode import decode_scratch, kv_decode
from infoquant_vllm.kernels.triton.kv_store import kv_store

CONTEXT, PROMPT = 16384, 2048
STORED = (16, 2048)  # tokens
DECODING = (1, 16)  # sequences
FULL = 1024  # sequences, with which no context is cut
VERIFIED = 4  # queries of a sequence whose drafts are verified
FEW_QUERIES = 8
PARTIAL = 4 * 2  # bytes of a part's power and total


@dataclass(frozen=True)
class Cache:
    """A layer's heads, and the cache that they look at."""

    heads: int
    kv_heads: int
    size: int = 128
    num_bits: tuple[int, int] = (4, 4)
    window: int | None = None
    soft_cap: float | None = None
    block: int = 16
    hadamard: bool = True
    offset: bool = True
    """whether keys are stored less one"""
    dtype: torch.dtype = torch.bfloat16

    def cells(self, tokens: int) -> torch.Tensor:
        """Of so many tokens, [blocks, kv_heads, block, bytes]."""
        shape = (
            triton.cdiv(tokens, self.block),
            self.kv_heads,
            self.block,
            kv_bytes_per_token_head(self.size, self.num_bits),
        )
        return torch.empty(shape, dtype=torch.uint8, device="meta")


OTHERS = MappingProxyType(
    {
        "heads of 64, window of 512": Cache(9, 3, 64, window=512),
        "heads of 96, blocks of 64": Cache(32, 32, 96, block=64),
        "heads of 256, soft-cap of 50": Cache(16, 2, 256, soft_cap=50.0),
        "codes of 8 bits": Cache(32, 8, num_bits=(8, 8)),
        "keys of 8 bits": Cache(28, 4, num_bits=(8, 4)),
    }
)
"""Beside the models' own, for the first of them."""


def _caches(model: Model) -> Iterator[tuple[str, Cache]]:
    yield "4 bits", Cache(model.heads // model.ranks, model.kv_heads // model.ranks, model.head_size)
    if model is MODELS[0]:
        yield from OTHERS.items()


def store_cases(model: Model) -> Iterator[Case]:
    """Keys through a Hadamard, less an offset."""
    for name, cache in _caches(model):
        for tokens in STORED:
            yield Case(model.name, "cache", name, tokens, store_call(cache, tokens))


def store_call(cache: Cache, tokens: int) -> Callable[[], Any]:
    """Keys and values of `tokens` into pages of their own."""
    with torch.device("meta"):
        key, value = torch.empty(2, tokens, cache.kv_heads, cache.size, dtype=cache.dtype)
        slots, clip = torch.empty(tokens, dtype=torch.int64), torch.empty(cache.kv_heads, 2)
        offset = torch.empty(cache.kv_heads, cache.size) if cache.offset else None
    cells = cache.cells(tokens)
    calibration, scheme = KVCalibration(clip, clip, offset), KVScheme(cache.num_bits, cache.hadamard)
    return lambda: kv_store(key, value, cells, slots, calibration, scheme)


def prompt_cases(model: Model) -> Iterator[Case]:
    """Of the model's own caches also a prompt's last chunk."""
    for name, cache in _caches(model):
        for context in (PROMPT, CONTEXT) if name == "4 bits" else (PROMPT,):
            macs = 2 * cache.heads * cache.size * sum(_seen(cache, context - PROMPT + i + 1) for i in range(PROMPT))
            said = f"{name}, last of {context} tokens"
            yield Case(model.name, "attention", said, PROMPT, attention_call(cache, 1, PROMPT, context), macs)


def decode_cases(model: Model) -> Iterator[Case]:
    """Sequences of CONTEXT tokens."""
    for name, cache in _caches(model):
        own = name == "4 bits"
        for sequences in (*DECODING, FULL) if own else DECODING:
            seen = sequences * _seen(cache, CONTEXT)
            macs, reads = 2 * cache.heads * cache.size * seen, cache.cells(seen).nbytes
            said = f"{name}, context of {CONTEXT}"
            call = attention_call(cache, sequences, 1, CONTEXT)
            yield Case(model.name, "attention", said, sequences, call, macs, reads)
        if own:
            said, tokens = f"{VERIFIED} queries, {name}, context of {CONTEXT}", DECODING[-1] * VERIFIED
            macs = 2 * cache.heads * cache.size * tokens * _seen(cache, CONTEXT)
            call = attention_call(cache, DECODING[-1], VERIFIED, CONTEXT)
            yield Case(model.name, "attention", said, tokens, call, macs)


def _seen(cache: Cache, tokens: int) -> int:
    return min(cache.window or tokens, tokens)


def attention_call(cache: Cache, sequences: int, queries: int, context: int) -> Callable[[], Any]:
    """The last `queries` of each sequence over `context` tokens."""
    with torch.device("meta"):
        query = torch.empty(sequences * queries, cache.heads, cache.size, dtype=cache.dtype)
        starts, lens = torch.empty(sequences + 1, dtype=torch.int32), torch.empty(sequences, dtype=torch.int32)
        table = torch.empty(sequences, context // cache.block, dtype=torch.int32)
    cells, scale = cache.cells(sequences * context), cache.size**-0.5
    score, scheme = ScoreParams(scale, cache.window, cache.soft_cap), KVScheme(cache.num_bits, cache.hadamard)
    given = (cells, Sequences(starts, lens, table), score, scheme, torch.empty_like(query))
    if queries > FEW_QUERIES:
        return lambda: kv_attention(query, *given)
    bounds = (cache.heads, cache.kv_heads, cache.size, cache.window, sequences, queries, context, query.device)

    def decode() -> None:
        scratch = [torch.empty(shape, device="meta") for shape in decode_scratch(*bounds)]
        kv_decode(query, *given, queries, scratch)

    return decode


def _context(launch: Launch) -> int:
    """Tokens of a sequence, of which the calls above fill the whole block table."""
    return launch.arguments["table_ptr"].shape[1] * launch.values["BLOCK"]


def _bytes(launch: Launch, *names: str) -> int:
    return sum(launch.arguments[f"{name}_ptr"].nbytes for name in names)


def _step_macs(launch: Launch) -> float:
    """Of a chunk: both products, of two bytes for each whole number."""
    given = launch.values
    return 4.0 * given["ROWS"] * given["CHUNK"] * given["SIZE"]


def _chunk_bytes(launch: Launch) -> float:
    """Of the stages that are under way."""
    given = launch.values
    return (launch.options["num_stages"] - 1) * given["CHUNK"] * given["cache_ptr"].shape[3]


def prompt_steps(launch: Launch) -> list[int]:
    """Chunks that each program of a kv-head goes through."""
    given, context = launch.values, _context(launch)
    sequences, step = given["num_sequences"], given["ROWS"] // given["GROUP"]
    queries = given["query_ptr"].shape[0] // sequences
    found = []
    for first_seen in range(context - queries, context, step):
        first = max(first_seen - given["WINDOW"] + 1, 0) // given["CHUNK"] if given["WINDOW"] else 0
        found.append(triton.cdiv(min(first_seen + step, context), given["CHUNK"]) - first)
    return found * sequences


def prompt_trips(launch: Launch) -> float:
    """On average."""
    steps = prompt_steps(launch)
    return sum(steps) / len(steps)


def prompt_busy(launch: Launch) -> int:
    """Those with queries."""
    return len(prompt_steps(launch)) * int(launch.grid[1])


def decode_steps(launch: Launch) -> tuple[int, int, int]:
    """Chunks of the context, parts with some, and programs to a sequence and kv-head that have some."""
    given, context = launch.values, _context(launch)
    first = max(context - given["WINDOW"], 0) // given["CHUNK"] if given["WINDOW"] else 0
    chunks = triton.cdiv(context, given["CHUNK"]) - first
    parts = triton.cdiv(chunks, max(triton.cdiv(chunks, given["KV_SPLITS"]), given["GROUP"]))
    return chunks, parts, min(parts, int(launch.grid[2]))


def decode_trips(launch: Launch) -> float:
    """On average, of the programs with some."""
    chunks, _, programs = decode_steps(launch)
    return chunks / programs


def decode_busy(launch: Launch) -> int:
    """Those with a part of the context."""
    return int(launch.grid[0] * launch.grid[1]) * decode_steps(launch)[2]


def decode_bytes(launch: Launch) -> int:
    """Pages of what is seen, block tables for every kv-head, queries for every program, and what is written."""
    given = launch.values
    chunks, parts, programs = decode_steps(launch)
    share = chunks * given["CHUNK"] / _context(launch)
    heads = given["query_ptr"].shape[0] * given["num_heads"]
    kept = parts * heads * (given["HEAD"] * 4 + PARTIAL) if given["PARTIAL"] else _bytes(launch, "out")
    tables = int(launch.grid[1] * share * _bytes(launch, "table"))
    return int(share * _bytes(launch, "cache")) + tables + programs * _bytes(launch, "query") + kept


def reduce_bytes(launch: Launch) -> int:
    """What there may be of parts of these tokens, and the output."""
    given = launch.values
    rows = given["out_ptr"].shape[0] * given["num_heads"] * given["MAX_SPLITS"]
    return rows * (given["HEAD"] * 4 + PARTIAL) + _bytes(launch, "out")


KV_ENTRIES: MappingProxyType[str, Entry] = MappingProxyType(
    {
        "kv_store_kernel": Entry(store_cases),
        "kv_attention_kernel": Entry(
            prompt_cases,
            prompt_trips,
            lambda launch: prompt_busy(launch) * prompt_trips(launch) * _step_macs(launch),
            _chunk_bytes,
            prompt_busy,
        ),
        "kv_decode_kernel": Entry(
            decode_cases,
            decode_trips,
            lambda launch: decode_busy(launch) * decode_trips(launch) * _step_macs(launch),
            _chunk_bytes,
            decode_busy,
            decode_bytes,
        ),
        "kv_splits_reduce_kernel": Entry(lambda model: iter(()), moved=reduce_bytes),
    }
)
