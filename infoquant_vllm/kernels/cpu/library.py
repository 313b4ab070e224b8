"""The compiled kernels for this CPU, loaded once per process."""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from infoquant_vllm.kernels.cpu.targets import ABI_VERSION, TARGETS

FOLDER = Path(__file__).parent
DTYPES = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})  # as csrc/simd/simd.h numbers them


@dataclass(frozen=True)
class Library:
    """The compiled kernels of one target, or the reason why they cannot be used."""

    target: str
    handle: ctypes.CDLL | None
    problem: str = ""

    @property
    def namespace(self) -> str:
        """Name the namespace in torch.ops where operations.cpp registers this library's operations."""
        return f"infoquant_{self.target}"


def runnable() -> list[str]:
    """List the targets that this CPU can run, best first; empty if torch is too old to report capabilities."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name, target in TARGETS.items() if all(map(capabilities.get, target.capabilities))]


@cache
def library() -> Library:
    """Load the best library that this CPU can run.

    The best target may be missing, where the compiler was too old for it. A library needs libgomp.so.1; torch is loaded
    first, so that it gets torch's: both share one pool of threads, of the size that torch.set_num_threads sets.
    """
    problems = []
    for target in runnable():
        found = _load(target, FOLDER / f"_native_{target}.so")
        if found.handle is not None:
            return found
        problems.append(found)
    return problems[0] if problems else Library("", None, "this CPU has no AVX2")


def _load(target: str, file: Path) -> Library:
    if not file.exists():
        return Library(target, None, "not compiled, `pip install -v` says why")
    try:
        handle = ctypes.CDLL(str(file))
        version = handle.infoquant_abi_version
        version.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        return Library(target, None, str(error))
    if version() != ABI_VERSION:
        return Library(target, None, f"{file.name} is version {version()}, not {ABI_VERSION}: install again")
    found, ask, define = Library(target, handle), handle.infoquant_problem, handle.infoquant_define_operations
    ask.restype = define.restype = ctypes.c_char_p
    problem = ask() or define(found.namespace.encode())
    return found if problem is None else Library(target, None, problem.decode())


def operations() -> Any:
    """Return the namespace with the library's operations.

    Raises:
        RuntimeError: No library can be used on this machine.
    """
    found = library()
    if found.handle is None:
        raise RuntimeError(f"infoquant: no native kernels: {found.problem}")
    return getattr(torch.ops, found.namespace)
