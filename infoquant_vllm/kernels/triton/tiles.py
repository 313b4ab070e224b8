"""Tiles of the GEMM and of attention by architecture, and a file of measured tiles that overrides them."""

import os
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import torch
import triton
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from infoquant_vllm.kernels.triton import common
from infoquant_vllm.kernels.triton.weights import Layout

TILES = "INFOQUANT_TILES"
"""Environment variable with the path of a JSON file, a list of `Measured` and `MeasuredAttention`."""
BAND = 8  # rows of GEMM tiles that share weights in the L2 cache
REDUCE_TILE = 4, 256  # tokens and channels of a program that adds split-K sums
FEW_TOKENS = 32
GROUPED_ROOM = 2  # rows of a tile by an expert's tokens, were they dealt evenly
LARGE_HEAD = 128  # head sizes above it have tiles of their own
SEQUENCE_SPLITS = 256  # KV splits of a decoding sequence, over all kv-heads
MAX_KV_SPLITS, MIN_KV_SPLITS = 64, 8  # of one kv-head
PROGRAMS_PER_SM = 8  # with which decoding fills a GPU
MAX_ROWS, MAX_LARGE_ROWS = 16, 8  # queries times heads of a decoding tile; more do not fit in registers


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is no power of two")
    return value


Power = Annotated[int, Field(ge=1, le=1024), AfterValidator(_power_of_two)]


class Tile(NamedTuple):
    """A program of the GEMM: channels, tokens and features of a step, its launch, and how a segment is split."""

    block_n: Power
    block_m: Power
    block_k: Annotated[Power, Field(ge=32)]
    warps: Annotated[Power, Field(le=16)]
    stages: Annotated[int, Field(ge=1, le=16)]
    splits: Annotated[int, Field(ge=1, le=256)] = 1


class AttentionTile(NamedTuple):
    """A program of attention: rows (queries times heads), tokens of a step, and its launch."""

    rows: Annotated[Power, Field(ge=8)]
    chunk: Annotated[Power, Field(ge=32)]
    warps: Annotated[Power, Field(le=16)]
    stages: Annotated[int, Field(ge=1, le=16)]


class AttentionTiles(NamedTuple):
    """Attention tiles for heads up to LARGE_HEAD and for larger ones."""

    prompt: AttentionTile = AttentionTile(32, 64, 4, 2)
    large_prompt: AttentionTile = AttentionTile(32, 64, 8, 2)
    decode: AttentionTile = AttentionTile(8, 128, 4, 3)
    large_decode: AttentionTile = AttentionTile(8, 128, 4, 2)  # a third stage would spill


class ArchTiles(NamedTuple):
    """Tiles of an architecture, compared by `python -m benchmarks.static --choose`.

    A GEMM tile serves up to block_m tokens, the last of a tuple any number.
    """

    linear: tuple[Tile, ...]
    sms: int
    """of a usual GPU"""
    attention: AttentionTiles = AttentionTiles()


_FEW = Tile(64, 16, 256, 4, 4), Tile(64, 32, 256, 4, 4), Tile(128, 64, 128, 8, 4)
_TILES = (*_FEW, Tile(128, 128, 128, 8, 3))
_LARGE = Tile(256, 128, 128, 8, 3)
_TILES_100 = Tile(128, 16, 256, 4, 4), Tile(256, 32, 128, 8, 4), Tile(256, 64, 128, 8, 3), _LARGE
TILE_TABLE = MappingProxyType(
    {
        80: ArchTiles(_TILES, sms=108),
        86: ArchTiles(_TILES, sms=84),
        89: ArchTiles(_TILES, sms=142),
        90: ArchTiles((*_TILES, _LARGE), sms=132),
        100: ArchTiles(_TILES_100, sms=148),
        120: ArchTiles(_TILES, sms=170),
    }
)


class Measured(BaseModel):
    """The tile for GEMMs of up to `tokens` tokens with a shape, on GPUs of compute capability `arch` / 10."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: int
    tokens: Annotated[int, Field(ge=1), AfterValidator(_power_of_two)]
    channels: int
    features: int
    grouped: bool
    tile: Tile


class MeasuredAttention(BaseModel):
    """The tile of an attention kernel for heads of a size, `group` of them to a kv-head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: int
    kernel: Literal["kv_attention", "kv_decode"]
    head_size: int
    group: int
    tile: AttentionTile


def arch_tiles(arch: int) -> ArchTiles:
    """Return the tiles of an architecture, 90 for 9.0; those of the next older one if it is not in the table."""
    return TILE_TABLE[max(known for known in TILE_TABLE if known <= arch)]


def token_class(tokens: int) -> int:
    """Round up to a power of two: tokens of a class share a tile and compiled code."""
    return 1 << max(tokens - 1, 0).bit_length()


def linear_tile(arch: int, tokens: int, channels: int, shape: Layout) -> Tile:
    """Return the tile of a GEMM, the same for all tokens of a class; INFOQUANT_TILES overrides the table."""
    tokens = token_class(tokens)
    key = arch, channels, shape.segments * shape.features, shape.grouped
    for entry in measured(os.environ.get(TILES)):
        if key == (entry.arch, entry.channels, entry.features, entry.grouped) and tokens <= entry.tokens:
            return entry.tile._replace(block_k=shape.block_k(entry.tile.block_k))
    table = arch_tiles(arch)
    tile = next((tile for tile in table.linear if tokens <= tile.block_m), table.linear[-1])
    tile = tile._replace(block_k=shape.block_k(tile.block_k))
    return tile._replace(splits=split_k(tile, tokens, channels, shape, table.sms))


def grouped_tile(rows: int, shape: Layout) -> Tile:
    """Return the tile of a product of all experts of a mixture, each with about `rows` tokens, of any architecture.

    Routers deal tokens unevenly: a tile has room for twice as many. All experts together are programs enough.
    """
    tile = next((tile for tile in _TILES if GROUPED_ROOM * rows <= tile.block_m), _TILES[-1])
    return tile._replace(block_k=shape.block_k(tile.block_k))


def split_k(tile: Tile, tokens: int, channels: int, shape: Layout, sms: int) -> int:
    """Return a power of two of splits: programs for all SMs, while each has more steps than loads in flight.

    Few tokens take two programs to an SM: they wait for memory, which gives more when asked for more at once.
    """
    programs = triton.cdiv(channels, tile.block_n) * triton.cdiv(tokens, tile.block_m) * shape.segments
    wanted = 2 * sms if tile.block_m <= FEW_TOKENS else sms
    count, steps = 1, shape.steps(tile.block_k)
    while 2 * count * programs <= wanted and steps >= 2 * count * tile.stages:
        count *= 2
    return count


def attention_tile(arch: int, kernel: str, size: int, group: int) -> AttentionTile:
    """Return the tile of `kernel` for heads of `size`.

    group: heads per kv-head, times the queries that share a tile; a tile always has rows for them. Batches and lengths
    do not change it, so that a row is the same bits in all of them.
    """
    tiles = arch_tiles(arch).attention
    small, large = tiles[2:] if kernel == "kv_decode" else tiles[:2]
    tile = small if size <= LARGE_HEAD else large
    for entry in measured_attention(os.environ.get(TILES)):
        if (arch, kernel, size, group) == (entry.arch, entry.kernel, entry.head_size, entry.group):
            tile = entry.tile
    return tile._replace(rows=max(tile.rows, triton.next_power_of_2(group)))


def measured(path: str | None) -> tuple[Measured, ...]:
    """Read a file's entries for GEMMs, fewest tokens first; raises ValueError naming the file if it is invalid."""
    return _entries(path)[0]


def measured_attention(path: str | None) -> tuple[MeasuredAttention, ...]:
    """Read a file's entries for attention; raises as `measured` does."""
    return _entries(path)[1]


@cache
def _entries(path: str | None) -> tuple[tuple[Measured, ...], tuple[MeasuredAttention, ...]]:
    if path is None:
        return (), ()
    try:
        entries = TypeAdapter(list[Measured | MeasuredAttention]).validate_json(Path(path).read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{TILES}={path}: {error}") from None
    linears = sorted((entry for entry in entries if isinstance(entry, Measured)), key=lambda entry: entry.tokens)
    return tuple(linears), tuple(entry for entry in entries if isinstance(entry, MeasuredAttention))


def shared_queries(size: int, group: int, queries: int) -> int:
    """Return how many queries of a decoding sequence share a tile."""
    rows = MAX_ROWS if size <= LARGE_HEAD else MAX_LARGE_ROWS
    return max(1, min(triton.next_power_of_2(queries), rows // group))


def kv_splits(kv_heads: int) -> int:
    """Return the most KV splits of a context. They depend on the layer only: a row has the same bits in any batch."""
    return min(max(triton.next_power_of_2(SEQUENCE_SPLITS // kv_heads), MIN_KV_SPLITS), MAX_KV_SPLITS)


def max_kv_splits(
    arch: int, heads: int, kv_heads: int, size: int, window: int | None, queries: int, context: int
) -> int:
    """Return the most KV splits that a context of up to `context` tokens has."""
    group = heads // kv_heads
    chunk = attention_tile(arch, "kv_decode", size, group * shared_queries(size, group, queries)).chunk
    chunks = triton.cdiv(context, chunk)
    if window:
        chunks = min(chunks, triton.cdiv(window, chunk) + 1)
    return min(kv_splits(kv_heads), triton.cdiv(chunks, group))


def max_split_sequences(kv_heads: int, sms: int) -> int:
    """Return the most sequences that leave a GPU idle unless their contexts are split over programs."""
    return (PROGRAMS_PER_SM * sms - 1) // kv_heads


def decode_programs(kv_heads: int, sequences: int, splits: int, sms: int) -> int:
    """Return the programs of a sequence and kv-head, which share its KV splits."""
    return max(1, min(splits, triton.cdiv(PROGRAMS_PER_SM * sms, sequences * kv_heads)))


def multiprocessors(device: torch.device) -> int:
    """Count a GPU's SMs; without a GPU those of the table for its architecture."""
    if device.type == "cuda":
        return int(common.gpu_properties(device).multi_processor_count)
    return arch_tiles(common.architecture(device)).sms
