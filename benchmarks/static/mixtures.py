"""Predict a mixture of experts by GPU and preset, beside what a fused one in bf16 or FP8 takes at the least.

A time is all launches of the experts of a layer, one after the other; routers and shared experts come on top. For bf16
and FP8 it is the data sheet's: weights of experts with tokens from memory, or multiplications on tensor cores,
whichever takes longer, and what goes through memory between launches. Tokens choose experts at random. Nothing is
measured.
"""

import argparse
from collections.abc import Iterator, Sequence

from rich.console import Console

from benchmarks.static.experts import MIXTURES, TOKENS, dealt, experts_call
from benchmarks.static.launches import compiled, launches
from benchmarks.static.predict import Machine, predict
from benchmarks.static.presets import GPUS, Gpu
from benchmarks.static.report import table
from infoquant_vllm.format import ModelShape

SHOWN = ("fast", "best", "w4a8kv4")
NAMES = tuple(MIXTURES)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static.mixtures", description=__doc__)
    archs = [gpu.machine.arch for gpu in GPUS]
    parser.add_argument("--archs", nargs="+", type=int, choices=archs, default=archs)
    parser.add_argument("--model", choices=NAMES, default=NAMES[0])
    options = parser.parse_args()
    chosen = [gpu for gpu in GPUS if gpu.machine.arch in options.archs]
    lines = [line for gpu in chosen for line in rows(gpu, MIXTURES[options.model])]
    Console(soft_wrap=True, highlight=False).print(table(["GPU", "preset", *map(str, TOKENS)], lines))


def rows(gpu: Gpu, shape: ModelShape, presets: Sequence[str] = SHOWN) -> Iterator[tuple[str, ...]]:
    """Yield lines of microseconds: of each preset, with the times faster than bf16 in brackets, and of bf16 and FP8."""
    bf16 = [floor(gpu, shape, tokens, gpu.bf16, 2) for tokens in TOKENS]
    for name in presets:
        ours = [seconds(gpu.machine, shape, name, tokens) for tokens in TOKENS]
        cells = (f"{1e6 * each:.0f} ({least / each:.1f})" for each, least in zip(ours, bf16, strict=True))
        yield gpu.machine.name, name, *cells
    yield gpu.machine.name, "bf16, at least", *(f"{1e6 * each:.0f}" for each in bf16)
    if gpu.fp8 is not None:
        fp8 = (floor(gpu, shape, tokens, gpu.fp8, 1) for tokens in TOKENS)
        yield gpu.machine.name, "FP8, at least", *(f"{1e6 * each:.0f}" for each in fp8)


def seconds(machine: Machine, shape: ModelShape, preset: str, tokens: int) -> float:
    """Predict the experts of a layer."""
    found = launches(experts_call(shape, preset, tokens), machine.arch)
    return sum(predict(launch, compiled(launch, machine.arch), machine).seconds for launch in found)


def floor(gpu: Gpu, shape: ModelShape, tokens: int, share: float, width: int) -> float:
    """Return the least seconds of a mixture with weights of `width` bytes, whose SwiGLU and sums are own launches."""
    machine, routed = gpu.machine, tokens * shape.num_experts_per_tok
    weights = 3 * shape.hidden_size * shape.expert_size
    having, _ = dealt(routed, shape.num_experts, 1)
    rate = machine.macs * machine.sms * machine.clock * share
    between = 2 * routed * (2 * 2 * shape.expert_size + width * shape.expert_size + 2 * shape.hidden_size)
    return max(width * having * weights / machine.dram, routed * weights / rate) + between / machine.dram


if __name__ == "__main__":
    main()
