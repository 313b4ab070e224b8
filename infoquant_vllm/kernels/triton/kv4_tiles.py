"""What attention over the quantized cache is compiled for: tiles by architecture and head size, parts of contexts."""

import math
import os
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import torch
import triton

from infoquant_vllm.kernels.triton.configurations import TILES, AttentionTile, measured_attention
from infoquant_vllm.kernels.triton.head_hadamard import hadamard_sizes

PARTS = 256  # programs that a decoding sequence is cut into, over all kv-heads
MAX_PARTS, MIN_PARTS = 64, 8  # of one kv-head
PROGRAMS = 8  # to a multiprocessor, beyond which decoding takes no more
MAX_ROWS, MAX_WIDE_ROWS = 16, 8  # of queries and heads that decoding multiplies at once; more do not fit in registers
WIDE = 128  # the largest head size that is not


class Layer(NamedTuple):
    """What attention of a layer is: `group` heads to a kv-head; window and soft_cap 0: none."""

    block: int
    """tokens"""
    head_size: int
    group: int
    num_bits: tuple[int, int]
    hadamard: bool
    window: int
    soft_cap: float
    """of scores in powers of two"""

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        cache: torch.Tensor,
        out: torch.Tensor,
        hadamard: bool,
        window: int | None,
        num_bits: tuple[int, int],
        soft_cap: float | None,
    ) -> Self:
        """The layer whose query and output [tokens, heads, head_size] and cache these are."""
        assert query.stride(2) == out.stride(2) == 1, "features of a head must be side by side"
        assert cache.stride()[2:] == (cache.shape[3], 1), "cells of a page must be side by side"
        (_, heads, size), (_, kv_heads, block, _) = query.shape, cache.shape
        cap = (soft_cap or 0.0) * math.log2(math.e)
        return cls(block, size, heads // kv_heads, num_bits, hadamard, window or 0, cap)


class AttentionChoice(NamedTuple):
    """Tiles of an architecture: prompts with heads up to WIDE and with wider ones, and decoding with either."""

    prompt: AttentionTile
    wide_prompt: AttentionTile
    decode: AttentionTile
    wide_decode: AttentionTile


_CHOICE = AttentionChoice(
    AttentionTile(32, 64, 4, 2),
    AttentionTile(32, 64, 8, 2),
    AttentionTile(8, 128, 4, 3),
    AttentionTile(8, 128, 4, 2),  # a third stage takes registers that are not there
)
CHOICES = MappingProxyType({80: _CHOICE, 86: _CHOICE, 89: _CHOICE, 90: _CHOICE, 100: _CHOICE, 120: _CHOICE})


def attention_tile(arch: int, kernel: str, size: int, group: int) -> AttentionTile:
    """The tile of `kernel` on a GPU of compute capability `arch`, 90 for 9.0, for heads of `size`.

    group: heads per kv-head, times the queries that share a tile; a tile always has rows for them. Batches and lengths
    do not change it, so that a row is the same bits in all of them.
    """
    choice = CHOICES[max(known for known in CHOICES if known <= arch)]
    narrow, wide = choice[2:] if kernel == "kv4_decode" else choice[:2]
    tile = narrow if size <= WIDE else wide
    for entry in measured_attention(os.environ.get(TILES)):
        if (arch, kernel, size, group) == (entry.arch, entry.kernel, entry.head_size, entry.group):
            tile = entry.tile
    return tile._replace(rows=max(tile.rows, triton.next_power_of_2(group)))


def prompt_constants(arch: int, layer: Layer) -> dict[str, Any]:
    """What `kv4_attention_kernel` is compiled for, its launch options included."""
    return _constants(layer, attention_tile(arch, "kv4_attention", layer.head_size, layer.group))


def decode_constants(arch: int, layer: Layer, kv_heads: int, queries: int) -> dict[str, Any]:
    """The same for `kv4_decode_kernel`, but for what depends on its scratch."""
    together = _together(layer.head_size, layer.group, queries)
    tile = attention_tile(arch, "kv4_decode", layer.head_size, layer.group * together)
    return _constants(layer, tile) | {"QUERIES": together, "PARTS": parts_of(kv_heads)}


def _together(size: int, group: int, queries: int) -> int:
    """How many queries of a sequence share a tile."""
    rows = MAX_ROWS if size <= WIDE else MAX_WIDE_ROWS
    return max(1, min(triton.next_power_of_2(queries), rows // group))


def _constants(layer: Layer, tile: AttentionTile) -> dict[str, Any]:
    order, log_n = hadamard_sizes(layer.head_size, layer.hadamard)
    return {
        "WINDOW": layer.window,
        "SOFT_CAP": layer.soft_cap,
        "BLOCK": layer.block,
        "HEAD": layer.head_size,
        "GROUP": layer.group,
        "ROWS": tile.rows,
        "SIZE": max(64, triton.next_power_of_2(layer.head_size)),
        "CHUNK": tile.chunk,
        "ORDER": order,
        "LOG_N": log_n,
        "HADAMARD": layer.hadamard,
        "KEY_BITS": layer.num_bits[0],
        "VALUE_BITS": layer.num_bits[1],
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": 255,  # left alone, ptxas spills a few bytes of some for the sake of a third block
        "enable_fp_fusion": True,
    }


def parts_of(kv_heads: int) -> int:
    """How many parts a context is cut into at most: it depends on the layer, never on the batch."""
    return min(max(triton.next_power_of_2(PARTS // kv_heads), MIN_PARTS), MAX_PARTS)


def most_parts(arch: int, heads: int, kv_heads: int, size: int, window: int | None, queries: int, context: int) -> int:
    """The most parts that a context of up to `context` tokens has."""
    group = heads // kv_heads
    chunk = attention_tile(arch, "kv4_decode", size, group * _together(size, group, queries)).chunk
    chunks = triton.cdiv(context, chunk)
    if window:
        chunks = min(chunks, triton.cdiv(window, chunk) + 1)
    return min(parts_of(kv_heads), triton.cdiv(chunks, group))


def sequences_in_parts(kv_heads: int, processors: int) -> int:
    """How many sequences leave a GPU of so many multiprocessors idle without being cut."""
    return (PROGRAMS * processors - 1) // kv_heads


def decode_slots(kv_heads: int, sequences: int, parts: int, processors: int) -> int:
    """Programs to a sequence and kv-head, which its parts are dealt out to."""
    return max(1, min(parts, triton.cdiv(PROGRAMS * processors, sequences * kv_heads)))


def query_scales(size: int, scale: float) -> tuple[float, float]:
    """What a Hadamard of queries is divided by, and the scale of scores in powers of two."""
    return 1 / math.sqrt(size), scale * math.log2(math.e)


def reduce_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """What `kv4_reduce_kernel` is compiled for, from what `kv4_decode_kernel` is."""
    names = ("WINDOW", "HEAD", "GROUP", "SIZE", "CHUNK", "PARTS", "MOST_PARTS", "enable_fp_fusion")
    return {name: constants[name] for name in names} | {"num_warps": 4}
