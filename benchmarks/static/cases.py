"""Models, and what is known of a kernel beside its code."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from benchmarks.static.launches import Launch


@dataclass(frozen=True)
class Model:
    """Sizes of a model, and over how many GPUs it is cut."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int = 128
    ranks: int = 1

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(features, channels) of a rank's linears."""
        heads, kv_heads, inner = self.heads // self.ranks, self.kv_heads // self.ranks, self.intermediate // self.ranks
        return {
            "qkv": (self.hidden, (heads + 2 * kv_heads) * self.head_size),
            "o": (heads * self.head_size, self.hidden),
            "gate_up": (self.hidden, 2 * inner),
            "down": (inner, self.hidden),
        }


LAYER_TOKENS = (1, 16, 32, 33, 64, 128, 256, 512, 2048, 8192)
"""For which a layer's linears are predicted: no step between two may be larger than the growth of the tokens."""
MODELS = (
    Model("LLaMA-3-8B", 4096, 14336, 32, 8),
    Model("LLaMA-2-13B", 5120, 13824, 40, 40),
    Model("LLaMA-3-70B", 8192, 28672, 64, 8),
    Model("LLaMA-3-70B TP 4", 8192, 28672, 64, 8, ranks=4),
    Model("Qwen2.5-7B", 3584, 18944, 28, 4),
)


@dataclass(frozen=True)
class Case:
    """A call of a public launcher, on the meta device, and what to call it."""

    model: str
    layer: str
    scheme: str
    tokens: int
    call: Callable[[], Any]
    macs: int = 0
    """that the product needs, without padding"""
    reads: int = 0
    """bytes that cannot but be read, where there is a bar on them"""


@dataclass(frozen=True)
class Entry:
    """A kernel by its function's name: calls that launch it, and facts about a launch that its code does not tell."""

    cases: Callable[[Model], Iterator[Case]]
    trips: Callable[[Launch], float] = lambda launch: 1.0
    """of the main loop"""
    macs: Callable[[Launch], float] = lambda launch: 0.0
    """on INT8 tensor cores in all of the kernel, padding included"""
    in_flight: Callable[[Launch], float] = lambda launch: inf
    """bytes that a program has asked memory for at once"""
    busy: Callable[[Launch], int] = lambda launch: launch.programs
    """programs that have something to do"""
    moved: Callable[[Launch], int] = lambda launch: launch.nbytes
    """bytes read and written"""
    loaded: Callable[[Launch], float] = lambda launch: 0.0
    """bytes that a program loads in a turn of the main loop, most of them from the L2 cache"""
