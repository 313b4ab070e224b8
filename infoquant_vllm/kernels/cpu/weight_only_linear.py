"""Linear of an unquantised input on the CPU; semantics: kernels/reference/weight_only_linear.py.

Weights stay packed. A few rows at a time are dequantised into a scratch buffer that stays in the
processor's cache. Products run in float64, as attention's do: a row comes out the same whatever the
batch is, at about half the speed of float32.
"""

import torch

from infoquant_vllm.kernels.cpu.quantized_linear import UNPACKED_FACTOR, prepare_weight
from infoquant_vllm.kernels.reference.rotate_quantize import rotate

BLOCK_ELEMENTS = 2**17  # 1 MiB of float64 weights at a time

_scratch = torch.empty(0, dtype=torch.float64)

prepare_weight_only = prepare_weight


def weight_only_linear(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """As the reference, on a weight from `prepare_weight_only`."""
    features, rows = x.shape[1], len(weight)
    y = rotate(x.float(), matrices, hadamard).to(x.dtype).double()
    out = x.new_empty(len(x), rows)
    step = max(1, BLOCK_ELEMENTS // features)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        zero = None if weight_zero is None else weight_zero[part]
        product = y @ _dequantize(weight[part], weight_scale[part], zero, features).t()
        out[:, part] = product if bias is None else product.add_(bias[part])
    return out


def _dequantize(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, features: int) -> torch.Tensor:
    """(code - zero) * scale of a few rows, [rows, features] float64; valid until the next call."""
    global _scratch  # noqa: PLW0603 (one buffer for all layers)
    rows, size = len(weight), len(weight) * features
    if _scratch.numel() < size:
        _scratch = torch.empty(size, dtype=torch.float64)
    values = _scratch[:size].view(rows, features)
    bits = 8 * weight.shape[1] // features
    if bits == 8:
        factor = 1
        values.copy_(weight)
    else:  # a signed nibble in the high half of an int8 is the code times 16
        factor, half = UNPACKED_FACTOR, features // 2
        values[:, :half] = weight * UNPACKED_FACTOR
        values[:, half:] = weight & -UNPACKED_FACTOR
    grouped = values.view(rows, scale.shape[1], -1)
    if zero is not None:
        grouped.sub_((zero.double()[..., None] - 2 ** (bits - 1)) * factor)
    grouped.mul_(scale.double()[..., None] / factor)
    return values
