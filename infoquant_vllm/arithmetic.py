"""One arithmetic for a model of 4-bit codes on the CPU, eager and compiled.

Last bits that differ become other 4-bit codes, and the codes of later layers follow: log-probabilities moved
by 0.4 to 1.0 on average between eager and inductor's fused norms and activations, which round elsewhere and sum
in another order. So norms and activations have operations of their own, by vLLM's two ways for that: another
provider of its operations, and a class in place of its layer. What is left to inductor rounds the same either way.
"""

import torch
from vllm import ir
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform

from infoquant_vllm.ops.elementwise import silu_and_mul
from infoquant_vllm.providers import PROVIDER


def use_own_arithmetic() -> None:
    """For the model that is being built and the rest of the process: before the first of its layers is made."""
    if not current_platform.is_cpu():
        return
    if SiluAndMul.__name__ not in op_registry_oot:
        SiluAndMul.register_oot(OwnSiluAndMul)
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
