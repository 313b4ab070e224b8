"""One arithmetic for a model of 4-bit codes on the CPU, eager and compiled.

Last bits that differ become other 4-bit codes, and the codes of later layers follow: log-probabilities moved
by 0.4 to 1.0 on average between eager and inductor's fused norms and activations, which round elsewhere and sum
in another order. So norms, activations and RoPE have operations of their own, by vLLM's two ways for that: another
provider of its operations, and a class in place of its layer. What is left to inductor rounds the same either way.
vLLM's own RoPE rounds so too, but turns in place, for which inductor copies queries, keys and values twice.
"""

import torch
from vllm import ir
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.rotary_embedding import Llama3RotaryEmbedding, RotaryEmbedding
from vllm.platforms import current_platform

from infoquant_vllm.ops.elementwise import rotary_embedding, silu_and_mul
from infoquant_vllm.providers import PROVIDER


def use_own_arithmetic() -> None:
    """For the model that is being built and the rest of the process: before the first of its layers is made."""
    if not current_platform.is_cpu():
        return
    for layer, own in OWN_LAYERS.items():
        if layer.__name__ not in op_registry_oot:
            layer.register_oot(own)
    for operation in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        if operation.get_priority()[:1] != [PROVIDER]:
            operation.set_default([PROVIDER, "native"])
    compilation = get_current_vllm_config().compilation_config
    compilation.custom_ops = ["all" if choice == "none" else choice for choice in compilation.custom_ops]


class OwnSiluAndMul(SiluAndMul):
    """SwiGLU's product as an operation of this package."""

    def forward_cpu(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 2 * size] to [..., size]."""
        return silu_and_mul(x)


class OwnRotaryEmbedding(RotaryEmbedding):
    """RoPE as an operation of this package, where it has one for it: halves of a head turn, keys are given."""

    def forward_cpu(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query and key [tokens, heads * head_size] at positions [tokens]."""
        if not self.is_neox_style or key is None or query.dim() != 2 or positions.dim() != 1:
            return super().forward_cpu(positions, query, key)
        return rotary_embedding(positions, query, key, self._match_cos_sin_cache_dtype(query), self.head_size)


class OwnLlama3RotaryEmbedding(OwnRotaryEmbedding, Llama3RotaryEmbedding):
    """The same with the angles of Llama 3."""


OWN_LAYERS: dict[type[CustomOp], type[CustomOp]] = {
    SiluAndMul: OwnSiluAndMul,
    RotaryEmbedding: OwnRotaryEmbedding,
    Llama3RotaryEmbedding: OwnLlama3RotaryEmbedding,
}
