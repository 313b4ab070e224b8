"""The part of `infoquant doctor` that needs torch and vLLM: which kernels serve on this machine."""

import importlib.util
from collections.abc import Iterator

from infoquant_vllm.finding import Finding
from infoquant_vllm.kernels.cpu.library import TARGETS, library, runnable
from infoquant_vllm.ops.table import FORCE, KERNELS, OF_DEVICE, forced_family, served_by

COMPILE_ANEW = "apt install g++ (or set CXX to a compiler), then pip install -v --force-reinstall --no-deps, as before"


def choice() -> Iterator[Finding]:
    """The family of kernels that INFOQUANT_KERNELS forces, or else what serves on this CPU."""
    try:
        family = forced_family()
    except ValueError as error:
        yield Finding(subject=FORCE, in_order=False, found=str(error), advice=f"unset {FORCE}")
        return
    if family is not None:
        advice = f"unset {FORCE} where this is no test" if family != "cpu" else ""
        yield Finding(subject=FORCE, in_order=True, found=f"{family} kernels alone", advice=advice)
    if family in (None, "cpu"):
        yield cpu_kernels()


def cpu_kernels() -> Finding:
    """Which kernels serve on this CPU: in order is the best library that its features allow."""
    usable, loaded = runnable(), library()
    found, advice = ", ".join(sorted({served_by(name) for name, family in KERNELS if family == "cpu"})), ""
    if not usable:
        found += f": no AVX2 here, which the least of {', '.join(TARGETS)} needs"
        advice = "serve on an x86-64 CPU with AVX2"
    elif loaded.handle is None:
        found += f": the library for {loaded.target} cannot be used ({loaded.problem})"
        advice = COMPILE_ANEW
    elif loaded.target != usable[0]:
        found += f", but this CPU has {usable[0]}"
        advice = f"a newer compiler is needed: {COMPILE_ANEW}"
    return Finding(subject="CPU kernels", in_order=not advice, found=found, advice=advice)


def platform() -> Iterator[Finding]:
    """What vLLM was built for, and whether everything that a W4A4KV4 layer needs has a kernel there."""
    if importlib.util.find_spec("vllm") is None:
        return  # which `packages` has said
    from vllm.platforms import current_platform

    device = current_platform.device_type or "unknown"
    found, advice = device, ""
    try:
        found += f": {served_by('linear', 'kv_store', 'kv_attention', device=device)}"
    except (NotImplementedError, ValueError) as error:
        advice = f"{error}" if device in OF_DEVICE else "use a build of vLLM for CPUs or for CUDA"
    yield Finding(subject="vLLM's platform", in_order=not advice, found=found, advice=advice)
