"""What attention over the quantised cache is compiled for: tiles by architecture and head size, parts of contexts."""

import os
from types import MappingProxyType
from typing import Any, NamedTuple

import triton

from infoquant_vllm.kernels.triton.configurations import TILES, AttentionTile, measured_attention
from infoquant_vllm.kernels.triton.head_hadamard import hadamard_sizes

PARTS = 256  # programs that a decoding sequence is cut into, over all kv-heads
MAX_PARTS, MIN_PARTS = 64, 8  # of one kv-head
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


class AttentionChoice(NamedTuple):
    """Tiles of an architecture: prompts and mixed batches with heads up to WIDE, with wider ones, and decoding."""

    mixed: AttentionTile
    wide: AttentionTile
    decode: AttentionTile


_CHOICE = AttentionChoice(AttentionTile(32, 64, 4, 2), AttentionTile(32, 64, 8, 2), AttentionTile(8, 128, 4, 3))
CHOICES = MappingProxyType({80: _CHOICE, 86: _CHOICE, 89: _CHOICE, 90: _CHOICE, 100: _CHOICE, 120: _CHOICE})


def attention_tile(arch: int, kernel: str, size: int, group: int) -> AttentionTile:
    """The tile of `kernel` on a GPU of compute capability `arch`, 90 for 9.0, for heads of `size`.

    group: heads per kv-head, for which a tile always has rows. Batches and lengths do not change it, so that a row
    is the same bits in all of them.
    """
    choice = CHOICES[max(known for known in CHOICES if known <= arch)]
    tile = choice.decode if kernel == "kv4_decode" else choice.mixed if size <= WIDE else choice.wide
    for entry in measured_attention(os.environ.get(TILES)):
        if (arch, kernel, size, group) == (entry.arch, entry.kernel, entry.head_size, entry.group):
            tile = entry.tile
    return tile._replace(rows=max(tile.rows, triton.next_power_of_2(group)))


def mixed_constants(arch: int, layer: Layer, kernel: str = "kv4_attention") -> dict[str, Any]:
    """What `kv4_attention_kernel` is compiled for, its launch options included."""
    order, log_n = hadamard_sizes(layer.head_size, layer.hadamard)
    tile = attention_tile(arch, kernel, layer.head_size, layer.group)
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


def decode_constants(arch: int, layer: Layer, kv_heads: int) -> dict[str, Any]:
    """The same for `kv4_decode_kernel`."""
    return mixed_constants(arch, layer, "kv4_decode") | {"PARTS": parts_of(kv_heads)}


def parts_of(kv_heads: int) -> int:
    """How many parts a context is cut into at most: it hangs on the layer, never on the batch."""
    return min(max(triton.next_power_of_2(PARTS // kv_heads), MIN_PARTS), MAX_PARTS)


def reduce_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """The same for `kv4_reduce_kernel`, from those of `decode_constants`."""
    names = ("WINDOW", "HEAD", "GROUP", "SIZE", "CHUNK", "PARTS", "enable_fp_fusion")
    return {name: constants[name] for name in names} | {"num_warps": 8 if constants["SIZE"] > WIDE else 4}
