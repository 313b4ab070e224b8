"""The kernels of the quantized KV cache: their calls for a model and the work of a launch."""

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
FULL = 1024  # sequences, enough that no context is split over programs
VERIFIED = 4  # queries of a sequence whose drafts are verified
FEW_QUERIES = 8
PARTIAL = 4 * 2  # bytes of a KV split's power and total


@dataclass(frozen=True)
class Cache:
    """A layer's heads and its cache."""

    heads: int
    kv_heads: int
    size: int = 128
    num_bits: tuple[int, int] = (4, 4)
    window: int | None = None
    soft_cap: float | None = None
    block: int = 16
    hadamard: bool = True
    key_mean: bool = True
    """whether it is subtracted from keys"""
    key_feedback: bool = False
    dtype: torch.dtype = torch.bfloat16

    def cells(self, tokens: int) -> torch.Tensor:
        """Return a cache of so many tokens, [blocks, kv_heads, block, bytes]."""
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
"""Caches beside the models' own, for the first model."""


def _caches(model: Model) -> Iterator[tuple[str, Cache]]:
    yield "4 bits", Cache(model.heads // model.ranks, model.kv_heads // model.ranks, model.head_size)
    if model is MODELS[0]:
        yield from OTHERS.items()


def store_cases(model: Model) -> Iterator[Case]:
    """Yield calls with keys less their mean, through a Hadamard."""
    for name, cache in _caches(model):
        for tokens in STORED:
            yield Case(model.name, "cache", name, tokens, store_call(cache, tokens))


def store_call(cache: Cache, tokens: int) -> Callable[[], Any]:
    """Return a call that stores keys and values of `tokens`."""
    with torch.device("meta"):
        key, value = torch.empty(2, tokens, cache.kv_heads, cache.size, dtype=cache.dtype)
        slots, clip = torch.empty(tokens, dtype=torch.int64), torch.empty(cache.kv_heads, 2)
        key_mean = torch.empty(cache.kv_heads, cache.size) if cache.key_mean else None
        feedback = torch.empty(cache.kv_heads, cache.size, cache.size) if cache.key_feedback else None
    cells = cache.cells(tokens)
    calibration, scheme = KVCalibration(clip, clip, key_mean, feedback), KVScheme(cache.num_bits, cache.hadamard)
    return lambda: kv_store(key, value, cells, slots, calibration, scheme)


def prompt_cases(model: Model) -> Iterator[Case]:
    """Yield prompts; of the model's own caches also a prompt's last chunk."""
    for name, cache in _caches(model):
        for context in (PROMPT, CONTEXT) if name == "4 bits" else (PROMPT,):
            macs = 2 * cache.heads * cache.size * sum(_seen(cache, context - PROMPT + i + 1) for i in range(PROMPT))
            said = f"{name}, last of {context} tokens"
            yield Case(model.name, "attention", said, PROMPT, attention_call(cache, 1, PROMPT, context), macs)


def decode_cases(model: Model) -> Iterator[Case]:
    """Yield decoding sequences of CONTEXT tokens."""
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
    """Return a call of the last `queries` of each sequence over `context` tokens."""
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
    """Return the tokens of a sequence: the calls above fill the whole block table."""
    return launch.arguments["table_ptr"].shape[1] * launch.values["BLOCK"]


def _bytes(launch: Launch, *names: str) -> int:
    return sum(launch.arguments[f"{name}_ptr"].nbytes for name in names)


def _step_macs(launch: Launch) -> float:
    """Count multiply-accumulates of a chunk: both products, of two bytes for each integer."""
    given = launch.values
    return 4.0 * given["ROWS"] * given["CHUNK"] * given["SIZE"]


def _chunk_bytes(launch: Launch) -> float:
    """Return the bytes of the stages in flight."""
    given = launch.values
    return (launch.options["num_stages"] - 1) * given["CHUNK"] * given["cache_ptr"].shape[3]


def prompt_steps(launch: Launch) -> list[int]:
    """Count the chunks of each program of a kv-head."""
    given, context = launch.values, _context(launch)
    sequences, step = given["num_sequences"], given["ROWS"] // given["GROUP"]
    queries = given["query_ptr"].shape[0] // sequences
    found = []
    for first_seen in range(context - queries, context, step):
        first = max(first_seen - given["WINDOW"] + 1, 0) // given["CHUNK"] if given["WINDOW"] else 0
        found.append(triton.cdiv(min(first_seen + step, context), given["CHUNK"]) - first)
    return found * sequences


def prompt_trips(launch: Launch) -> float:
    """Return the average chunks of a program."""
    steps = prompt_steps(launch)
    return sum(steps) / len(steps)


def prompt_busy(launch: Launch) -> int:
    """Count the programs with queries."""
    return len(prompt_steps(launch)) * int(launch.grid[1])


def decode_steps(launch: Launch) -> tuple[int, int, int]:
    """Count chunks of the context, KV splits, and programs with work to a sequence and kv-head."""
    given, context = launch.values, _context(launch)
    first = max(context - given["WINDOW"], 0) // given["CHUNK"] if given["WINDOW"] else 0
    chunks = triton.cdiv(context, given["CHUNK"]) - first
    splits = triton.cdiv(chunks, max(triton.cdiv(chunks, given["KV_SPLITS"]), given["GROUP"]))
    return chunks, splits, min(splits, int(launch.grid[2]))


def decode_trips(launch: Launch) -> float:
    """Return the average chunks of a program with work."""
    chunks, _, programs = decode_steps(launch)
    return chunks / programs


def decode_busy(launch: Launch) -> int:
    """Count the programs with a KV split."""
    return int(launch.grid[0] * launch.grid[1]) * decode_steps(launch)[2]


def decode_bytes(launch: Launch) -> int:
    """Sum visible pages, block tables for every kv-head, queries for every program, and what is written."""
    given = launch.values
    chunks, splits, programs = decode_steps(launch)
    share = chunks * given["CHUNK"] / _context(launch)
    heads = given["query_ptr"].shape[0] * given["num_heads"]
    kept = splits * heads * (given["HEAD"] * 4 + PARTIAL) if given["PARTIAL"] else _bytes(launch, "out")
    tables = int(launch.grid[1] * share * _bytes(launch, "table"))
    return int(share * _bytes(launch, "cache")) + tables + programs * _bytes(launch, "query") + kept


def reduce_bytes(launch: Launch) -> int:
    """Sum the most KV splits that these tokens can have, and the output."""
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
