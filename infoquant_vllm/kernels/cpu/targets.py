"""The builds of the C++ kernels, for hatch_build.py, which loads this file alone, and for library.py."""

from types import MappingProxyType
from typing import NamedTuple

ABI_VERSION = 15  # of the operations' schemas; compiled into each library, so that library.py refuses any other


class Target(NamedTuple):
    """One build of the kernels."""

    flags: tuple[str, ...]
    """Of the compiler."""
    capabilities: tuple[str, ...]
    """Of the CPU, as torch.cpu.get_capabilities() names them."""


_AVX512_VNNI = ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl", "avx512_vnni")
_AVX2 = ("avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt")

TARGETS = MappingProxyType(
    {  # in order of preference
        "amx": Target(
            ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8"),
            (*_AVX512_VNNI, "avx512_bf16", "amx_tile", "amx_int8"),
        ),
        "avx512vnni": Target(("-march=x86-64-v4", "-mavx512vnni"), _AVX512_VNNI),
        "avxvnni": Target(("-march=x86-64-v3", "-mavxvnni"), (*_AVX2, "avx_vnni")),
        "avx2": Target(("-march=x86-64-v3",), _AVX2),
    }
)
