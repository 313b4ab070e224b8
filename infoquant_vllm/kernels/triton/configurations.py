"""Which tile serves which product: a table by architecture, and over it a file that a GPU was measured for."""

import os
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import torch
import triton
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from infoquant_vllm.kernels.triton.weights import Layout

TILES = "INFOQUANT_TILES"
"""Environment variable with the path of a JSON file, a list of `Measured` and `MeasuredAttention`."""
BAND = 8  # rows of tiles that share weights in the L2 cache
FEW_TOKENS = 32
INTERPRETED = triton.knobs.runtime.interpret  # as it was when the kernels were defined


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is no power of two")
    return value


Power = Annotated[int, Field(ge=1, le=1024), AfterValidator(_power_of_two)]


class Tile(NamedTuple):
    """A program of `int4_linear`: channels, tokens and features of a step, and how it is launched."""

    block_n: Power
    block_m: Power
    block_k: Annotated[Power, Field(ge=32)]
    warps: Annotated[Power, Field(le=16)]
    stages: Annotated[int, Field(ge=1, le=16)]
    splits: Annotated[int, Field(ge=1, le=256)] = 1


class Choice(NamedTuple):
    """Tiles of an architecture, compared by `python -m benchmarks.static --choose`, and its usual number of SMs.

    `row` is for one group, `groups` for more: a tile serves up to block_m tokens, the last of them any number.
    """

    row: tuple[Tile, ...]
    groups: tuple[Tile, ...]
    sms: int


_FEW = Tile(64, 16, 256, 4, 4), Tile(64, 32, 256, 4, 4), Tile(128, 64, 128, 8, 4)
_ROW = (*_FEW, Tile(128, 128, 128, 4, 3))
_WIDE = Tile(256, 128, 128, 8, 3)
_GROUPS = Tile(64, 16, 128, 4, 4), Tile(64, 32, 128, 4, 4), Tile(128, 64, 128, 8, 3)
_ROW_100 = Tile(128, 16, 256, 4, 4), Tile(256, 32, 128, 8, 4), Tile(256, 64, 128, 8, 3), _WIDE
_GROUPS_100 = (*_GROUPS[:2], Tile(128, 32, 128, 4, 4))  # tiles of 64 tokens spill there
CHOICES = MappingProxyType(
    {
        80: Choice(_ROW, _GROUPS, sms=108),
        86: Choice(_ROW, _GROUPS, sms=84),
        89: Choice(_ROW, _GROUPS, sms=142),
        90: Choice((*_FEW, _WIDE), _GROUPS, sms=132),
        100: Choice(_ROW_100, _GROUPS_100, sms=148),
        120: Choice(_ROW, _GROUPS, sms=170),
    }
)


class Measured(BaseModel):
    """The tile for products of up to `tokens` tokens with a shape, on GPUs of compute capability `arch` / 10."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: int
    tokens: Annotated[int, Field(ge=1), AfterValidator(_power_of_two)]
    channels: int
    features: int
    group_size: int
    tile: Tile


class AttentionTile(NamedTuple):
    """A program of attention: rows (queries times heads), tokens of a step, how it is launched."""

    rows: Annotated[Power, Field(ge=8)]
    chunk: Annotated[Power, Field(ge=32)]
    warps: Annotated[Power, Field(le=16)]
    stages: Annotated[int, Field(ge=1, le=16)]


class MeasuredAttention(BaseModel):
    """The tile of an attention kernel for heads of a size, `group` of them to a kv-head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: int
    kernel: Literal["kv4_attention", "kv4_decode"]
    head_size: int
    group: int
    tile: AttentionTile


def token_class(tokens: int) -> int:
    """The power of two from `tokens` on, for which tiles are chosen, so that a choice can be kept."""
    return 1 << max(tokens - 1, 0).bit_length()


def linear_tile(arch: int, tokens: int, channels: int, shape: Layout) -> Tile:
    """The tile of a product of so many tokens on a GPU of compute capability `arch`, 90 for 9.0.

    It is the same for all tokens of a class. The file that INFOQUANT_TILES names goes before the table.
    """
    tokens = token_class(tokens)
    key = arch, channels, shape.features, shape.group_size
    for entry in measured(os.environ.get(TILES)):
        if key == (entry.arch, entry.channels, entry.features, entry.group_size) and tokens <= entry.tokens:
            return entry.tile._replace(block_k=shape.block_k(entry.tile.block_k))
    choice = CHOICES[max(known for known in CHOICES if known <= arch)]
    tiles = choice.groups if shape.group_size else choice.row
    tile = next((tile for tile in tiles if tokens <= tile.block_m), tiles[-1])
    tile = tile._replace(block_k=shape.block_k(tile.block_k))
    return tile._replace(splits=splits(tile, tokens, channels, shape, choice.sms))


def splits(tile: Tile, tokens: int, channels: int, shape: Layout, sms: int) -> int:
    """A power of two: programs for all SMs, as long as each has more steps than it has loads under way.

    Few tokens take two programs to an SM: what they wait for is memory, and it gives more when asked for more at once.
    """
    programs = triton.cdiv(channels, tile.block_n) * triton.cdiv(tokens, tile.block_m)
    room = 2 * sms if tile.block_m <= FEW_TOKENS else sms
    count, steps = 1, shape.steps(tile.block_k)
    while 2 * count * programs <= room and steps >= 2 * count * tile.stages:
        count *= 2
    return count


def measured(path: str | None) -> tuple[Measured, ...]:
    """A file's entries for linears, those of fewest tokens first; raises ValueError naming it where it is not one."""
    return _entries(path)[0]


def measured_attention(path: str | None) -> tuple[MeasuredAttention, ...]:
    """The same for attention."""
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


def current_device() -> torch.device:
    """Where kernels run: the current GPU, or this CPU under the interpreter."""
    on_cpu = INTERPRETED or not torch.cuda.is_available()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def architecture(device: torch.device) -> int:
    """Ten times a GPU's compute capability; under the interpreter that of the first that is served."""
    return 80 if device.type == "cpu" else _architecture(_index(device))


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; under the interpreter what the table says of its architecture."""
    return _multiprocessors(_index(device)) if device.type == "cuda" else CHOICES[architecture(device)].sms


def _index(device: torch.device) -> int:
    """The number of a GPU; a device without one is the current GPU, which may be another at the next call."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
