"""Which kernel serves which operation on which device, for which bits, groups and head sizes."""

import os
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch

from infoquant_vllm.kernels.cpu.library import library

FORCE = "INFOQUANT_KERNELS"
FAMILIES = ("reference", "cpu", "triton")
OF_DEVICE = MappingProxyType({"cpu": "cpu", "cuda": "triton"})
MIN_CAPABILITY = 80  # the first with int8 tensor cores of 16 x 8 x 32


@dataclass(frozen=True)
class Route:
    """A module of infoquant_vllm.kernels, and what it takes where it does not take all.

    limits: by what a layer says of itself, see `require`; a group of 0 features is all of them.
    """

    module: str
    limits: Mapping[str, Container[float]] = field(default_factory=dict)


def _routes(*modules: str) -> tuple[Route, ...]:
    return tuple(Route(module) for module in modules)


CACHE_LIMITS = MappingProxyType({"head_size": range(8, 257, 8), "key_bits": (4, 8), "value_bits": (4, 8)})
UNCAPPED = MappingProxyType({"soft_cap": (0,)})  # no bound on scores
GROUPS = range(0, 1 << 20, 32)
LINEAR_LIMITS = MappingProxyType(
    {"weight_bits": (4, 8), "input_bits": (4, 8, 16), "weight_group": GROUPS, "input_group": GROUPS}
)
TRITON_LINEAR = (Route("triton.linear", LINEAR_LIMITS),)

# By operation and family, the best first that `_serves`.
KERNELS = MappingProxyType(
    {
        ("linear", "cpu"): _routes("cpu.linear", "torch.linear"),
        ("prepare_matrices", "cpu"): _routes("cpu.linear", "torch.linear"),
        ("prepare_weight", "cpu"): _routes("cpu.quantized_linear", "torch.linear"),
        ("prepare_grid", "cpu"): _routes("cpu.quantized_linear", "torch.linear"),
        ("weight_rows", "cpu"): _routes("cpu.quantized_linear", "torch.linear"),
        ("rotate_rows", "cpu"): _routes("cpu.rotate_rows", "torch.dense"),
        ("dense_linear", "cpu"): _routes("cpu.dense_linear", "torch.dense"),
        ("rms_norm", "cpu"): _routes("cpu.elementwise", "torch.elementwise"),
        ("add_rms_norm", "cpu"): _routes("cpu.elementwise", "torch.elementwise"),
        ("silu_and_mul", "cpu"): _routes("cpu.elementwise", "torch.elementwise"),
        ("rotary_embedding", "cpu"): _routes("cpu.elementwise", "torch.elementwise"),
        ("kv_store", "cpu"): _routes("cpu.kv_cache", "torch.kv_cache"),
        ("kv_attention", "cpu"): (Route("cpu.kv_cache", UNCAPPED), Route("torch.kv_cache", UNCAPPED)),
        ("linear", "triton"): TRITON_LINEAR,
        ("prepare_matrices", "triton"): TRITON_LINEAR,
        ("prepare_weight", "triton"): TRITON_LINEAR,
        ("prepare_grid", "triton"): TRITON_LINEAR,
        ("weight_rows", "triton"): TRITON_LINEAR,
        ("rotate_rows", "triton"): _routes("triton.rotate_rows"),
        ("dense_linear", "triton"): _routes("torch.dense"),  # plain torch, which runs anywhere
        ("rms_norm", "triton"): _routes("torch.elementwise"),
        ("add_rms_norm", "triton"): _routes("torch.elementwise"),
        ("silu_and_mul", "triton"): _routes("torch.elementwise"),
        ("rotary_embedding", "triton"): _routes("torch.elementwise"),
        ("kv_store", "triton"): (Route("triton.kv4_store", CACHE_LIMITS),),
        ("kv_attention", "triton"): (Route("triton.kv4_attention", CACHE_LIMITS),),
        ("kv_decode", "triton"): (Route("triton.kv4_decode", CACHE_LIMITS),),
        ("decode_scratch", "triton"): (Route("triton.kv4_decode", CACHE_LIMITS),),
        ("linear", "reference"): _routes("torch.linear"),
        ("prepare_matrices", "reference"): _routes("torch.linear"),
        ("prepare_weight", "reference"): _routes("torch.linear"),
        ("prepare_grid", "reference"): _routes("torch.linear"),
        ("weight_rows", "reference"): _routes("torch.linear"),
        ("rotate_rows", "reference"): _routes("torch.dense"),
        ("dense_linear", "reference"): _routes("torch.dense"),
        ("rms_norm", "reference"): _routes("torch.elementwise"),
        ("add_rms_norm", "reference"): _routes("torch.elementwise"),
        ("silu_and_mul", "reference"): _routes("torch.elementwise"),
        ("rotary_embedding", "reference"): _routes("torch.elementwise"),
        ("kv_store", "reference"): _routes("torch.kv_cache"),
        ("kv_attention", "reference"): _routes("torch.kv_cache"),
    }
)


@cache
def forced_family() -> str | None:
    """The family that INFOQUANT_KERNELS names; raises ValueError for a word that names none."""
    word = os.environ.get(FORCE)
    if word is not None and word not in FAMILIES:
        raise ValueError(f"{FORCE}={word}: expected one of {', '.join(FAMILIES)}, or leave it unset")
    return word


@cache
def kernel(operation: str, device: str) -> Callable[..., Any]:
    """The one kernel for `operation` on a device type; raises NotImplementedError where there is none."""
    module = _route(operation, device).module
    run: Callable[..., Any] = getattr(import_module(f"infoquant_vllm.kernels.{module}"), operation)
    return run


def has_kernel(operation: str, device: str) -> bool:
    """Whether `operation` has a kernel of its own on a device type."""
    return (operation, forced_family() or OF_DEVICE.get(device, "")) in KERNELS


def require(operation: str, device: str, **facts: float) -> None:
    """Refuse, by NotImplementedError, bits, groups and sizes that the kernel for `operation` does not take."""
    limits = _route(operation, device).limits
    for name, value in facts.items():
        if name in limits and value not in limits[name]:
            expected = limits[name]
            said = f"multiples of {expected.step} up to {max(expected)}" if isinstance(expected, range) else expected
            raise NotImplementedError(
                f"infoquant: {name} {value}: the kernel for {operation} on {device} serves {said}"
            )


def served_by(*operations: str, device: str = "cpu") -> str:
    """Names of the kernels behind some operations, for people: "native avx512vnni", "torch, oneDNN int8"."""
    return ", ".join(dict.fromkeys(_name(_route(operation, device).module) for operation in operations))


def capability() -> int:
    """Of the current CUDA device, ten times the major number plus the minor one."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _route(operation: str, device: str) -> Route:
    family = forced_family() or OF_DEVICE.get(device, "")
    _refuse_device(family, device)
    routes = KERNELS.get((operation, family), ())
    for route in routes:
        if _serves(route, device):
            return route
    known = sorted(served for name, served in KERNELS if name == operation)
    raise NotImplementedError(f"infoquant: no kernel for {operation} on {device}; there are {', '.join(known)}")


def _refuse_device(family: str, device: str) -> None:
    if family == "cpu" and device != "cpu":
        raise NotImplementedError(f"infoquant: {FORCE}=cpu: these kernels do not run on {device}; unset it")
    if family == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotImplementedError(f"infoquant: {FORCE}=triton on a CPU is Triton's interpreter: set TRITON_INTERPRET=1")
    if device == "cuda" and capability() < MIN_CAPABILITY:
        found, least = capability() / 10, MIN_CAPABILITY / 10
        raise NotImplementedError(f"infoquant: compute capability {found}, the kernels need {least} or more")


def _serves(route: Route, device: str) -> bool:
    """Whether a route can be taken here; on a GPU vLLM's own norms and RoPE serve unless torch's are forced."""
    if route.module.startswith("cpu."):
        return library().handle is not None
    return route.module != "torch.elementwise" or device == "cpu" or forced_family() == "reference"


def _name(module: str) -> str:
    family, _, name = module.partition(".")
    if family == "cpu":
        return f"native {library().target}"
    if family == "triton":
        return "Triton, interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "Triton"
    if forced_family() == "reference":
        return "reference"
    return "torch, oneDNN int8" if name == "linear" else "torch"
