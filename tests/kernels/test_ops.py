"""The operations as torch sees them: schemas and shapes that torch.compile relies on, memory, refusals."""

from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from infoquant_vllm.kernels import ops
from infoquant_vllm.kernels.cpu.library import library, operations
from infoquant_vllm.kernels.dispatch import backend
from infoquant_vllm.kernels.operands import PackedWeight

native = pytest.mark.skipif(library().handle is None, reason="no library for this CPU")


def _linear(tokens: int, num_bits: int = 4) -> tuple[Any, ...]:
    torch.manual_seed(0)
    kernels = backend("cpu")
    packed, zero = torch.randint(0, 256, (40, 288)), torch.randint(0, 16, (40, 9))
    codes, multiplier, zero = (each.to(torch.uint8) for each in (packed, torch.ones(40, 9), zero))
    weight = kernels.prepare_linear(PackedWeight(codes, torch.rand(40, 1), multiplier, zero), 4, 1)
    clip = None if num_bits == 16 else torch.ones(1, 2)
    x = torch.randn(tokens, 1152).bfloat16()[:, ::2]  # a layout that kernels have to copy
    bias = torch.randn(40).bfloat16()
    mean = None if num_bits == 16 else torch.randn(576)
    inputs = kernels.prepare_matrices([], 64), 64, clip, num_bits, True, 1, mean
    return x, *inputs, *weight, bias


def _elementwise(name: str) -> tuple[Any, ...]:
    x, weight = torch.randn(5, 64).bfloat16(), torch.ones(64).bfloat16()
    return {"rms_norm": (x, weight, 1e-5), "add_rms_norm": (x, x.clone(), weight, 1e-5)}.get(name, (x,))


OPERATIONS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "linear": (ops._linear, lambda: _linear(5)),
    "linear of 16-bit inputs": (ops._linear, lambda: _linear(5, 16)),
    **{
        name: (getattr(ops, name), lambda name=name: _elementwise(name))
        for name in ("rms_norm", "add_rms_norm", "silu_and_mul", "gelu_tanh_and_mul")
    },
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_schemas_and_fakes_tell_what_the_kernels_do(name: str) -> None:
    operation, arguments = OPERATIONS[name]
    torch.library.opcheck(operation, arguments(), test_utils=("test_schema", "test_faketensor"))


def _product(num_bits: int) -> tuple[Any, ...]:
    return *operations().rotate_quantize(*_linear(5, num_bits)[:8]), *_linear(5)[8:], 1


# Parts of what is served, which tests and benchmarks call.
ALONE: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "quantizing to 4 bits": ("rotate_quantize", lambda: _linear(5)[:8]),
    "quantizing to 16 bits": ("rotate_quantize", lambda: _linear(5, 16)[:8]),
    "a product without offsets": ("quantized_linear", lambda: _product(4)),
    "a product with offsets": ("quantized_linear", lambda: _product(8)),
    "few_rows_linear": ("few_rows_linear", lambda: (torch.randn(2, 64).bfloat16(), torch.randn(9, 64).bfloat16())),
}


@native
@pytest.mark.parametrize("name", [*OPERATIONS, *ALONE])
def test_calls_leave_no_memory_behind(name: str) -> None:
    if name in OPERATIONS:
        operation, arguments = OPERATIONS[name]
    else:
        operation, arguments = getattr(operations(), ALONE[name][0]), ALONE[name][1]
    given, process = arguments(), psutil.Process()
    used = []
    for _ in range(2):
        for _ in range(20_000):
            operation(*given)
        used.append(process.memory_info().rss)
    assert used[1] - used[0] < 3e5  # the smallest thing to lose, a handle, makes 640 kB


@native
def test_what_attention_cannot_read_is_refused() -> None:
    query, cache = torch.randn(1, 2, 64), torch.zeros(2, 1, 16, 72, dtype=torch.uint8)
    starts, lens, table = torch.tensor([0, 1]).int(), torch.tensor([1]).int(), torch.zeros(1, 1).int()
    settings, out = (False, 1.0, 0, 0.0, 4, 4), torch.empty(1, 2, 64)
    attend = operations().kv_attention
    attend(query, cache, starts, lens, table, *settings, out)
    with pytest.raises(RuntimeError, match="must be int32"):
        attend(query, cache, starts, lens.long(), table, *settings, out)
    with pytest.raises(RuntimeError, match="the rows of the output must be contiguous"):
        attend(query, cache, starts, lens, table, *settings, out.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(RuntimeError, match="entries of a page"):
        attend(query, cache[..., ::2], starts, lens, table, *settings, out)
