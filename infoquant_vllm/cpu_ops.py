"""Norms, products of gated MLPs and RoPE on the CPU with the same last bits in eager and in compiled models.

Last bits that differ become other 4-bit codes, and the codes of later layers follow: log-probabilities moved by 0.4 to
1.0 on average between eager mode and inductor's fused norms and activations, which round at other places and sum in
another order. So these operations are this package's own, by vLLM's two ways to replace one: another implementation of
its IR operation, and an out-of-tree class in place of its layer. The operations left to inductor round the same either
way. vLLM's own RoPE does too, but works in place, for which inductor copies queries, keys and values twice.

Importing this module registers the implementations, which no model uses by default; `use_cpu_ops` selects them.
"""

import torch
from vllm import ir
from vllm.config import CompilationConfig
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.rotary_embedding import Llama3RotaryEmbedding, RotaryEmbedding
from vllm.platforms import current_platform

from infoquant_vllm.kernels.ops import add_rms_norm, gelu_tanh_and_mul, rms_norm, rotary_embedding, silu_and_mul

PROVIDER = "infoquant"


def use_cpu_ops(compilation: CompilationConfig) -> None:
    """Select the operations of this module for the rest of the process, before the model's first layer is built."""
    if not current_platform.is_cpu():
        return
    for layer, replacement in OOT_LAYERS.items():
        if layer.__name__ not in op_registry_oot:
            layer.register_oot(replacement)
    for operation in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        if operation.get_priority()[:1] != [PROVIDER]:
            operation.set_default([PROVIDER, "native"])
    compilation.custom_ops = ["all" if choice == "none" else choice for choice in compilation.custom_ops]


def _supports_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return weight is not None and weight.dtype in (x.dtype, torch.float32) and variance_size is None


def _supports_add_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return _supports_norm(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype


@ir.ops.rms_norm.register_impl(PROVIDER, supported=current_platform.is_cpu(), supports_args=_supports_norm)
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    assert weight is not None  # see _supports_norm
    return rms_norm(x, weight, epsilon)


@ir.ops.fused_add_rms_norm.register_impl(
    PROVIDER, supported=current_platform.is_cpu(), supports_args=_supports_add_norm
)
def _fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert weight is not None  # see _supports_add_norm
    return add_rms_norm(x, x_residual, weight, epsilon)


class InfoQuantSiluAndMul(SiluAndMul):
    """SwiGLU's product."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., 2 * size] to [..., size]."""
        return silu_and_mul(x)


class InfoQuantGeluAndMul(GeluAndMul):
    """Gemma's product, where GELU is approximated by tanh; elsewhere vLLM's own."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., 2 * size] to [..., size]."""
        return gelu_tanh_and_mul(x) if self.approximate == "tanh" else super().forward_cpu(x)


class InfoQuantRotaryEmbedding(RotaryEmbedding):
    """RoPE, where the halves of a head are rotated and keys are given; elsewhere vLLM's own."""

    def forward_cpu(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate query and key [tokens, heads * head_size] at positions [tokens]."""
        if not self.is_neox_style or key is None or query.dim() != 2 or positions.dim() != 1:
            return super().forward_cpu(positions, query, key)
        return rotary_embedding(positions, query, key, self._match_cos_sin_cache_dtype(query), self.head_size)


class InfoQuantLlama3RotaryEmbedding(InfoQuantRotaryEmbedding, Llama3RotaryEmbedding):
    """The same with the angles of Llama 3."""


OOT_LAYERS: dict[type[CustomOp], type[CustomOp]] = {
    SiluAndMul: InfoQuantSiluAndMul,
    GeluAndMul: InfoQuantGeluAndMul,
    RotaryEmbedding: InfoQuantRotaryEmbedding,
    Llama3RotaryEmbedding: InfoQuantLlama3RotaryEmbedding,
}
