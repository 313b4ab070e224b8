"""The compiled kernels for this CPU, loaded once per process."""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

ABI_VERSION = 11
FOLDER = Path(__file__).parent
AVX512_VNNI = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl", "avx512_vnni")
TARGETS = {  # in order of preference: what torch.cpu.get_capabilities() must name
    "amx": (*AVX512_VNNI, "avx512_bf16", "amx_tile", "amx_int8"),
    "avx512vnni": AVX512_VNNI,
    "avxvnni": ("avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt", "avx_vnni"),
    "avx2": ("avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt"),
}
DTYPES = MappingProxyType({torch.float32: 0, torch.bfloat16: 1, torch.float16: 2})  # as the C++ code numbers them


@dataclass(frozen=True)
class Library:
    """Compiled kernels and the target that they are for, or why there are none."""

    target: str
    handle: ctypes.CDLL | None
    problem: str = ""

    @property
    def namespace(self) -> str:
        """Where operations.cpp has defined the library's operations: torch.ops.NAMESPACE."""
        return f"infoquant_{self.target}"


def runnable() -> list[str]:
    """The targets whose code this CPU can run, best first; none where an older torch cannot tell."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return [target for target, features in TARGETS.items() if all(capabilities.get(each) for each in features)]


@cache
def library() -> Library:
    """The best library that this CPU can run, or why there is none.

    A compiler may have been too old for the best target. A library needs libgomp.so.1, which is torch's own where
    torch is loaded first: one pool of threads for both, of the size that torch.set_num_threads sets.
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
    """The library's operations, by name.

    Raises RuntimeError where no library serves.
    """
    found = library()
    if found.handle is None:
        raise RuntimeError(f"infoquant: no native kernels: {found.problem}")
    return getattr(torch.ops, found.namespace)
