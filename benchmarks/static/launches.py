"""The launches of a public launcher as it would make them on a GPU, recorded from tensors without memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from triton import JITFunction
from triton.compiler import ASTSource

from infoquant_vllm.kernels.triton import common

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.uint8: "*u8"}
TYPES |= {torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}
ALIGNED = 16  # bytes of an address, and what a number must be a multiple of, for Triton to know of it


@dataclass(frozen=True)
class Launch:
    """A kernel, its programs, its arguments by name, and num_warps and the like."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def programs(self) -> int:
        """How many there are."""
        total = 1
        for size in self.grid:
            total *= size
        return total

    @property
    def values(self) -> dict[str, Any]:
        """Its arguments by name, those of tuples by the names of their fields in upper case."""
        return flattened(self.arguments)

    @property
    def nbytes(self) -> int:
        """Of its tensors, each read or written once."""
        return sum(value.nbytes for value in self.arguments.values() if isinstance(value, torch.Tensor))

    def source(self) -> ASTSource:
        """As Triton specializes it: addresses and numbers of multiples of 16, ones and None as constants.

        Addresses are taken for multiples, as torch's are; of what is not to be specialized nothing is known.
        """
        signature, constants, attributes = {}, {}, {}
        for index, param in enumerate(self.kernel.params):
            value = self.arguments[param.name]
            kind = "constexpr" if param.is_constexpr or value is None else _type(value)
            specialized = not param.do_not_specialize
            if kind == "constexpr" or (specialized and kind == "i32" and value == 1):
                kind, constants[param.name] = "constexpr", value
            elif specialized and (kind.startswith("*") or (kind == "i32" and value % ALIGNED == 0)):
                attributes[(index,)] = [["tt.divisibility", ALIGNED]]
            signature[param.name] = kind
        return ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)


def flattened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace a named tuple by its fields, their names in upper case."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        fields = value._asdict() if hasattr(value, "_asdict") else None
        found |= {name: value} if fields is None else {field.upper(): each for field, each in fields.items()}
    return found


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launches(call: Callable[[], Any], arch: int) -> list[Launch]:
    """What `call` launches on a GPU of compute capability `arch`, 90 for 9.0; its tensors are on the meta device."""
    recorded: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [param.name for param in kernel.params]
        arguments = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
        recorded.append(Launch(kernel, tuple(grid), arguments, kwargs))

    with patch.object(JITFunction, "run", record), patch.object(common, "architecture", lambda device: arch):
        call()
    return recorded
