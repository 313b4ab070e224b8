"""Which kernel serves which operation on which device."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

from infoquant_vllm.kernels.native.library import library

# Modules of infoquant_vllm.kernels, the best first; those of `native` serve where its library is there for this CPU.
KERNELS = MappingProxyType(
    {
        ("linear", "cpu"): ("native.linear", "cpu.linear"),
        ("prepare_matrices", "cpu"): ("native.linear", "cpu.linear"),
        ("prepare_weight", "cpu"): ("native.quantized_linear", "cpu.quantized_linear"),
        ("prepare_grid", "cpu"): ("native.quantized_linear", "cpu.quantized_linear"),
        ("weight_rows", "cpu"): ("native.quantized_linear", "cpu.quantized_linear"),
        ("rotate_rows", "cpu"): ("native.rotate_rows", "cpu.rotate_rows"),
        ("dense_linear", "cpu"): ("native.dense_linear", "cpu.dense_linear"),
        ("rms_norm", "cpu"): ("native.elementwise", "reference.elementwise"),
        ("add_rms_norm", "cpu"): ("native.elementwise", "reference.elementwise"),
        ("silu_and_mul", "cpu"): ("native.elementwise", "reference.elementwise"),
        ("rotary_embedding", "cpu"): ("native.elementwise", "reference.elementwise"),
        ("kv_store", "cpu"): ("native.kv_cache", "cpu.kv_cache"),
        ("kv_attention", "cpu"): ("native.kv_cache", "cpu.kv_cache"),
    }
)
NAMES = MappingProxyType({"cpu.linear": "torch, oneDNN int8"})  # of the modules that are not plain torch


@cache
def kernel(operation: str, device: str) -> Callable[..., Any]:
    """The one kernel for `operation` on a device type; raises NotImplementedError where there is none."""
    return getattr(import_module(f"infoquant_vllm.kernels.{_module(operation, device)}"), operation)


def served_by(*operations: str, device: str = "cpu") -> str:
    """Names of the kernels behind some operations, for people: "native avx512vnni", "torch, oneDNN int8"."""
    return ", ".join(dict.fromkeys(_name(_module(operation, device)) for operation in operations))


def _module(operation: str, device: str) -> str:
    for module in KERNELS.get((operation, device), ()):
        if not module.startswith("native.") or library().handle is not None:
            return module
    served = sorted(known for name, known in KERNELS if name == operation)
    raise NotImplementedError(f"infoquant: no kernel for {operation} on {device}; this release has {served}")


def _name(module: str) -> str:
    return f"native {library().target}" if module.startswith("native.") else NAMES.get(module, "torch")
