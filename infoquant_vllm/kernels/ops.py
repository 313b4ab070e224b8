"""Operations of a forward pass as torch.compile sees them: opaque, with one schema and one fake each.

Where torch is built for CPUs alone and the compiled library has an operation of that name, it is called without Python
in between, which costs more than many a kernel when there are few tokens. Elsewhere Python asks `backend`.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from infoquant_vllm.kernels.cpu.library import library, operations
from infoquant_vllm.kernels.dispatch import FORCE, backend
from infoquant_vllm.kernels.operands import ExpertChoice, ExpertLinear, InputQuant, PackedWeight

Run = TypeVar("Run", bound=Callable[..., Any])

_library = torch.library.Library("infoquant", "FRAGMENT")
_has_only_cpus = torch.version.cuda is None and torch.version.hip is None
_calls_native = _has_only_cpus and os.environ.get(FORCE, "cpu") == "cpu" and library().handle is not None


def _custom_op(fake: Callable[..., Any]) -> Callable[[Run], Run]:
    """Register a function as the operation of its name; fake: shapes and dtypes of its outputs."""

    def register(run: Run) -> Run:
        name = run.__name__.removeprefix("_")
        if _calls_native and hasattr(operations(), name):
            torch.library.register_fake(f"{library().namespace}::{name}", fake)
            return cast(Run, getattr(operations(), name).default)
        _library.define(name + torch.library.infer_schema(run, mutates_args=()))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"infoquant::{name}", fake, lib=_library)
        return cast(Run, getattr(torch.ops.infoquant, name).default)

    return register


def linear(x: Tensor, inputs: InputQuant, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Transform and quantize x [tokens, K], then multiply by a quantized weight [N, K]: [tokens, N]."""
    return _linear(x, *inputs, *weight, bias)


def _fake_linear(x: Tensor, *operands: Any) -> Tensor:
    return x.new_empty((x.shape[0], PackedWeight(*operands[7:11]).scale.shape[0]))


@_custom_op(_fake_linear)
def _linear(
    x: Tensor,
    matrices: list[Tensor],
    hadamard: int,
    clip_ratio: Tensor | None,
    num_bits: int,
    symmetric: bool,
    segments: int,
    mean: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    inputs = InputQuant(matrices, hadamard, clip_ratio, num_bits, symmetric, segments, mean)
    packed = PackedWeight(weight, weight_scale, weight_multiplier, weight_zero_point)
    return backend(x.device.type).linear(x, inputs, packed, bias)


def experts(x: Tensor, choice: ExpertChoice, gate_up: ExpertLinear, down: ExpertLinear) -> Tensor:
    """Map x [tokens, hidden] through the experts that are chosen for each token; return the weighted sums, like x."""
    operands: tuple[Any, ...] = (*choice, *gate_up.inputs, *gate_up.weight, *down.inputs, *down.weight)
    return _experts(x, *operands)


@_custom_op(lambda x, *_: _contiguous_like(x))
def _experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    matrices: list[Tensor],
    hadamard: int,
    clip_ratio: Tensor | None,
    num_bits: int,
    symmetric: bool,
    segments: int,
    mean: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_multiplier: Tensor | None,
    weight_zero_point: Tensor | None,
    down_matrices: list[Tensor],
    down_hadamard: int,
    down_clip_ratio: Tensor | None,
    down_num_bits: int,
    down_symmetric: bool,
    down_segments: int,
    down_mean: Tensor | None,
    down_weight: Tensor,
    down_weight_scale: Tensor,
    down_weight_multiplier: Tensor | None,
    down_weight_zero_point: Tensor | None,
) -> Tensor:
    inputs = InputQuant(matrices, hadamard, clip_ratio, num_bits, symmetric, segments, mean)
    gate_up = ExpertLinear(inputs, PackedWeight(weight, weight_scale, weight_multiplier, weight_zero_point))
    down_inputs = InputQuant(
        down_matrices, down_hadamard, down_clip_ratio, down_num_bits, down_symmetric, down_segments, down_mean
    )
    down_packed = PackedWeight(down_weight, down_weight_scale, down_weight_multiplier, down_weight_zero_point)
    down = ExpertLinear(down_inputs, down_packed)
    return backend(x.device.type).experts(x, ExpertChoice(weights, chosen), gate_up, down)


@_custom_op(lambda x, weight: x.new_empty((x.shape[0], weight.shape[0])))
def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [tokens, K] by an unquantized weight [N, K], that of lm_head: [tokens, N]."""
    return backend(x.device.type).dense_linear(x, weight)


@_custom_op(lambda weight, rows, features: weight.new_empty((*rows.shape, features), dtype=torch.int8))
def weight_rows(weight: Tensor, rows: Tensor, features: int) -> Tensor:
    """Look up rows [...] of a packed 8-bit weight [N, features]: signed codes [..., features] int8."""
    return backend(weight.device.type).weight_rows(weight, rows, features)


@_custom_op(lambda rows, rotation, gain: _contiguous_like(rows))
def rotate_rows(rows: Tensor, rotation: Tensor, gain: Tensor | None) -> Tensor:
    """Rotate rows [tokens, H] into or out of the residual basis (R1), times gain [H] if given."""
    return backend(rows.device.type).rotate_rows(rows, rotation, gain)


@_custom_op(lambda x, weight, epsilon: _contiguous_like(x))
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalize x by its root mean square over the last dimension, times weight in the dtype of x or float32."""
    return backend(x.device.type).rms_norm(x, weight, epsilon)


@_custom_op(lambda x, residual, weight, epsilon: (_contiguous_like(x), _contiguous_like(x)))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and the sum."""
    return backend(x.device.type).add_rms_norm(x, residual, weight, epsilon)


@_custom_op(lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
def silu_and_mul(x: Tensor) -> Tensor:
    """Return silu(gate) * up of x [..., 2 * size], gate before up."""
    return backend(x.device.type).silu_and_mul(x)


@_custom_op(lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """Return gelu_tanh(gate) * up of x [..., 2 * size], gate before up."""
    return backend(x.device.type).gelu_tanh_and_mul(x)


@_custom_op(lambda positions, query, key, *_: (query.new_empty(query.shape), key.new_empty(key.shape)))
def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, cos_sin: Tensor, head_size: int
) -> tuple[Tensor, Tensor]:
    """Apply RoPE to query and key [tokens, heads * head_size]; positions [tokens], cos_sin [positions, rotary_dim]."""
    return backend(query.device.type).rotary_embedding(positions, query, key, cos_sin, head_size)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
