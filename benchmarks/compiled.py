"""Compile the Triton kernels in every variant, for every architecture, and count them; nothing runs.

With the Triton of the environment, or another in a folder that PYTHONPATH names.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import triton
from rich.console import Console

from benchmarks.static.launches import Launch, launches, stack_and_shared
from benchmarks.static.predict import MACHINES, configuration
from benchmarks.static.variants import Calls, other_calls, serving_calls
from offline.presets import PRESETS

OTHERS_ARCHS = (80, 90)
"""Architectures for which what other checkpoints need is compiled too, beside what serves LLaMA-3-8B."""
KNOWN_SPILLS = re.compile(
    r"rotate_quantize_kernel (sm_(80|86|89) .*outer=64 inner=64 |.* outer=96 inner=4 )"
    r"|gemm_kernel sm_(80|86|89) .*weight_bits=8 .*block_n=128 block_m=128 "
    r"|gemm_kernel sm_80 .*block_n=64 block_m=32 "
    r"|gemm_kernel sm_100 .*block_n=256 block_m=(32|128) "
    r"|kv_(decode|attention)_kernel sm_(80|90) .*head=(80|192|256) "
    r"|kv_decode_kernel sm_(80|90) .*head=64 group=40 "
)
"""See docs/gpu-kernels.md."""


class Variant(NamedTuple):
    """A launch for an architecture."""

    launch: Launch
    arch: int

    @property
    def name(self) -> str:
        """Name its kernel and all that its code depends on."""
        return f"{self.launch.kernel.__name__} sm_{self.arch} {configuration(self.launch)}"


class Compiled(NamedTuple):
    """The outcome of a variant; problem: why it does not compile or cannot be launched, "" if it can."""

    name: str
    arch: int
    problem: str
    stack: int
    """bytes of a thread, to which registers were spilled"""


def main() -> None:
    """Print the count per architecture, every spill and every failure; exit status 1 if one is not known."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--archs", nargs="+", type=int, choices=MACHINES, default=list(MACHINES))
    parser.add_argument(
        "--others",
        nargs="*",
        type=int,
        choices=MACHINES,
        default=list(OTHERS_ARCHS),
        help="architectures for which what other checkpoints need is compiled too",
    )
    parser.add_argument("--presets", nargs="+", choices=PRESETS, help="only what these need; default: all and more")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    found = compile_all(variants(options.archs, options.presets, options.others), options.workers)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"Triton {triton.__version__}: {summary(found)}")
    console.print(*(f"{each.name}: {each.stack} bytes of spilled registers" for each in spilled(found)), sep="\n")
    console.print(*(f"{each.name}: {each.problem}" for each in failed(found)), sep="\n")
    sys.exit(any(each.problem or not KNOWN_SPILLS.match(each.name) for each in (*failed(found), *spilled(found))))


def variants(
    archs: Sequence[int], presets: Iterable[str] | None = None, others: Sequence[int] = OTHERS_ARCHS
) -> list[Variant]:
    """List what presets (None: any checkpoint) make vLLM compile on GPUs of these architectures, each once."""
    found: list[Variant] = []
    for arch in archs:
        wanted = _of(serving_calls(PRESETS if presets is None else presets), arch)
        if presets is None and arch in others:
            wanted = _of(other_calls(), arch) | wanted
        found += wanted.values()
    return found


def _of(calls: Calls, arch: int) -> dict[tuple[Any, ...], Variant]:
    """Return variants by all that Triton compiles them for."""
    found = [launch for call in calls for launch in launches(call, arch)]
    return {(launch.source().hash(), *sorted(launch.options.items())): Variant(launch, arch) for launch in found}


def compile_all(wanted: Sequence[Variant], workers: int) -> list[Compiled]:
    """Compile all variants in so many processes."""
    _WANTED[:] = wanted
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        return list(pool.map(_compile, range(len(wanted)), chunksize=4))


_WANTED: list[Variant] = []
"""Inherited by forked processes, as a launch cannot be pickled."""


def _compile(index: int) -> Compiled:
    launch, arch = variant = _WANTED[index]
    stack, problem, limit = 0, "", MACHINES[arch].shared_limit
    try:
        stack, shared = stack_and_shared(launch, arch)
        if shared > limit:
            problem = f"{shared} bytes of shared memory, at most {limit} on that GPU"
    except Exception as error:  # any exception of the compiler
        problem = f"{type(error).__name__}: {error}"
    return Compiled(variant.name, arch, problem, stack)


def summary(found: Iterable[Compiled]) -> str:
    """Count variants per architecture."""
    counts = Counter(each.arch for each in found)
    return f"{sum(counts.values())} variants compiled, " + ", ".join(f"{n} for sm_{arch}" for arch, n in counts.items())


def failed(found: Iterable[Compiled]) -> list[Compiled]:
    """List variants that do not compile, or need more shared memory than a program can have."""
    return [each for each in found if each.problem]


def spilled(found: Iterable[Compiled]) -> list[Compiled]:
    """List variants with spilled registers."""
    return [each for each in found if each.stack]


if __name__ == "__main__":
    main()
