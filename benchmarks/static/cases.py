"""Models, and facts about kernels that their code does not show."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

from benchmarks.static.launches import Launch
from infoquant_vllm.format import ModelShape


@dataclass(frozen=True)
class Model:
    """Sizes of a model, and its TP size."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int = 128
    ranks: int = 1

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (features, channels) of a TP rank's linears."""
        heads, kv_heads, inner = self.heads // self.ranks, self.kv_heads // self.ranks, self.intermediate // self.ranks
        return {
            "qkv": (self.hidden, (heads + 2 * kv_heads) * self.head_size),
            "o": (heads * self.head_size, self.hidden),
            "gate_up": (self.hidden, 2 * inner),
            "down": (inner, self.hidden),
        }

    def shape(self, architecture: str, vocab_size: int, **experts: Any) -> ModelShape:
        """Return the shape of one layer in a class of these sizes; experts: the sizes of a mixture."""
        return ModelShape(
            architecture=architecture,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=1,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_size,
            vocab_size=vocab_size,
            **experts,
        )


LAYER_TOKENS = (1, 16, 32, 33, 64, 128, 256, 512, 2048, 8192)
"""Numbers of tokens of a prediction: from one to the next no layer may slow down by more than the tokens grow."""
MODELS = (
    Model("LLaMA-3-8B", 4096, 14336, 32, 8),
    Model("LLaMA-2-13B", 5120, 13824, 40, 40),
    Model("LLaMA-3-70B", 8192, 28672, 64, 8),
    Model("LLaMA-3-70B TP 4", 8192, 28672, 64, 8, ranks=4),
    Model("Qwen2.5-7B", 3584, 18944, 28, 4),
)


@dataclass(frozen=True)
class Case:
    """A call of a public launcher, on the meta device, and its name."""

    model: str
    layer: str
    scheme: str
    tokens: int
    call: Callable[[], Any]
    macs: int = 0
    """multiply-accumulates without padding"""
    reads: int = 0
    """bytes that must be read, if there is a threshold on them; else 0"""


@dataclass(frozen=True)
class Entry:
    """A kernel by its function's name: calls that launch it, and facts about a launch that its code does not show."""

    cases: Callable[[Model], Iterator[Case]]
    trips: Callable[[Launch], float] = lambda launch: 1.0
    """iterations of the main loop"""
    macs: Callable[[Launch], float] = lambda launch: 0.0
    """on INT8 tensor cores in all of the kernel, padding included"""
    in_flight: Callable[[Launch], float] = lambda launch: inf
    """bytes that a program has in flight"""
    busy: Callable[[Launch], int] = lambda launch: launch.programs
    """programs with work"""
    moved: Callable[[Launch], int] = lambda launch: launch.nbytes
    """bytes read and written"""
    loaded: Callable[[Launch], float] = lambda launch: 0.0
    """bytes that a program loads in an iteration of the main loop, mostly from the L2 cache"""


def linear_loaded(launch: Launch) -> float:
    """Return the bytes of weights, multipliers and values of a step."""
    given = launch.arguments
    words = 0 if given["word_ptr"] is None else given["BLOCK_K"] // given["RUN"] * given["word_ptr"].itemsize
    weights = given["BLOCK_K"] * given["WEIGHT_BITS"] // 8 + words
    return given["BLOCK_N"] * weights + given["BLOCK_M"] * given["BLOCK_K"]


def linear_in_flight(launch: Launch) -> float:
    """Return the bytes of the stages in flight."""
    return (launch.options["num_stages"] - 1) * linear_loaded(launch)
