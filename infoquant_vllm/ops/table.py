"""Which kernel serves which operation on which device."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

KERNELS = MappingProxyType(
    {
        ("rotate_quantize", "cpu"): "infoquant_vllm.kernels.cpu.rotate_quantize",
        ("prepare_weight", "cpu"): "infoquant_vllm.kernels.cpu.quantized_linear",
        ("quantized_linear", "cpu"): "infoquant_vllm.kernels.cpu.quantized_linear",
        ("weight_only_linear", "cpu"): "infoquant_vllm.kernels.cpu.weight_only_linear",
        ("rotate_rows", "cpu"): "infoquant_vllm.kernels.cpu.rotate_rows",
        ("kv_store", "cpu"): "infoquant_vllm.kernels.cpu.kv_cache",
        ("kv_attention", "cpu"): "infoquant_vllm.kernels.cpu.kv_cache",
    }
)


@cache
def kernel(operation: str, device: str) -> Callable[..., Any]:
    """The one kernel for `operation` on a device type; raises NotImplementedError where there is none."""
    module = KERNELS.get((operation, device))
    if module is None:
        served = sorted(known for name, known in KERNELS if name == operation)
        raise NotImplementedError(f"infoquant: no kernel for {operation} on {device}; this release has {served}")
    return getattr(import_module(module), operation)
