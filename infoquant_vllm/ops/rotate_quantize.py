"""Operation: rotate the input of a linear layer and quantise it (one pass, opaque to torch.compile)."""

import torch
from vllm.utils.torch_utils import direct_register_custom_op

from infoquant_vllm.ops.table import kernel


def _rotate_quantize(
    x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int, clip: torch.Tensor, num_bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return kernel("rotate_quantize", x.device.type)(x, matrices, hadamard, clip, num_bits, symmetric)


def _fake(
    x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int, clip: torch.Tensor, num_bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    per_group = (x.shape[0], clip.shape[0])
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(per_group, dtype=torch.float32),
        x.new_empty(per_group, dtype=torch.int32),
    )


direct_register_custom_op("infoquant_rotate_quantize", _rotate_quantize, fake_impl=_fake)
rotate_quantize = torch.ops.vllm.infoquant_rotate_quantize
