"""Predict LLaMA-3-8B's linears by GPU and preset, beside what bf16 and FP8 take at the least: which preset pays where.

A time is all launches of a layer's linears, products and quantizers, one after the other. For bf16 and FP8 it is the
data sheet's: weights from memory or multiplications on tensor cores, whichever takes longer. Nothing is measured.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from rich.console import Console

from benchmarks.static.cases import MODELS
from benchmarks.static.launches import compiled, launches
from benchmarks.static.predict import MACHINES, Machine, predict
from benchmarks.static.report import table
from benchmarks.static.variants import LLAMA, linear_call
from offline.presets import PRESETS

TOKENS = (1, 64, 2048)
SHOWN = ("fast", "best", "w4a8kv4")


class Gpu(NamedTuple):
    """A GPU, and the rates of its tensor cores with float32 sums, as shares of INT8's."""

    machine: Machine
    bf16: float
    fp8: float | None = None

    def floor(self, tokens: int, share: float, width: int) -> float:
        """Return the least seconds of a layer's linears with weights of `width` bytes."""
        weights = sum(features * channels for features, channels in MODELS[0].linears.values())
        machine = self.machine
        rate = machine.macs * machine.sms * machine.clock * share
        return max(width * weights / machine.dram, tokens * weights / rate)


GPUS = (
    Gpu(replace(MACHINES[86], name="RTX 3090", sms=82, clock=1.695e9, dram=0.936e12), 1 / 4),
    Gpu(MACHINES[80], 1 / 2),
    Gpu(MACHINES[89], 1 / 2, 1.0),
    Gpu(MACHINES[90], 1 / 2, 1.0),
    Gpu(MACHINES[100], 1 / 2, 1.0),
    Gpu(MACHINES[120], 1 / 4, 1 / 2),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static.presets", description=__doc__)
    archs = [gpu.machine.arch for gpu in GPUS]
    parser.add_argument("--archs", nargs="+", type=int, choices=archs, default=archs)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=SHOWN)
    options = parser.parse_args()
    chosen = [gpu for gpu in GPUS if gpu.machine.arch in options.archs]
    lines = [line for gpu in chosen for line in rows(gpu, options.presets)]
    Console(soft_wrap=True, highlight=False).print(table(["GPU", "preset", *map(str, TOKENS)], lines))


def rows(gpu: Gpu, presets: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield lines of microseconds: of each preset, and of bf16 and FP8."""
    for name in presets:
        yield gpu.machine.name, name, *(_microseconds(seconds(gpu.machine, name, tokens)) for tokens in TOKENS)
    for name, share, width in (("bf16, at least", gpu.bf16, 2), ("FP8, at least", gpu.fp8, 1)):
        if share is not None:
            yield gpu.machine.name, name, *(_microseconds(gpu.floor(tokens, share, width)) for tokens in TOKENS)


def seconds(machine: Machine, preset: str, tokens: int) -> float:
    """Predict a layer's linears."""
    config = PRESETS[preset].quantization_config(LLAMA)
    total = 0.0
    for site, (features, channels) in MODELS[0].linears.items():
        call = linear_call(config.config_groups[site], tokens, features, channels)
        for launch in launches(call, machine.arch):
            total += predict(launch, compiled(launch, machine.arch), machine).seconds
    return total


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


if __name__ == "__main__":
    main()
