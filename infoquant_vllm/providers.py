"""Implementations of vLLM's own operations, registered with the plugin; a model of ours asks for them by name."""

import torch
from vllm import ir
from vllm.platforms import current_platform

from infoquant_vllm.ops.elementwise import add_rms_norm, rms_norm

PROVIDER = "infoquant"


def _plain(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return weight is not None and weight.dtype == x.dtype and variance_size is None


def _plain_sum(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _plain(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype


@ir.ops.rms_norm.register_impl(PROVIDER, supported=current_platform.is_cpu(), supports_args=_plain)
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    assert weight is not None  # or _plain had said no
    return rms_norm(x, weight, epsilon)


@ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supported=current_platform.is_cpu(), supports_args=_plain_sum)
def _fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert weight is not None  # or _plain_sum had said no
    return add_rms_norm(x, x_residual, weight, epsilon)
