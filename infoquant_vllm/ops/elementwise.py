"""Operations between the linears: RMS norm, SwiGLU's product and RoPE (opaque to torch.compile)."""

import torch

from infoquant_vllm.ops.define import define
from infoquant_vllm.ops.table import kernel


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return kernel("rms_norm", x.device.type)(x, weight, epsilon)


def _fake_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return kernel("add_rms_norm", x.device.type)(x, residual, weight, epsilon)


def _fake_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_rms_norm(x, weight, epsilon), _fake_rms_norm(x, weight, epsilon)


def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return kernel("silu_and_mul", x.device.type)(x)


def _fake_silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _rotary_embedding(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, cos_sin: torch.Tensor, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return kernel("rotary_embedding", query.device.type)(positions, query, key, cos_sin, head_size)


def _fake_rotary_embedding(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, cos_sin: torch.Tensor, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


rms_norm = define("rms_norm", _rms_norm, _fake_rms_norm)
add_rms_norm = define("add_rms_norm", _add_rms_norm, _fake_add_rms_norm)
silu_and_mul = define("silu_and_mul", _silu_and_mul, _fake_silu_and_mul)
rotary_embedding = define("rotary_embedding", _rotary_embedding, _fake_rotary_embedding)
