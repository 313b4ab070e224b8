"""Product of an input of 16 bits with quantized weights."""

import torch

from infoquant_vllm.kernels.reference.quantized_linear import quantized_linear
from infoquant_vllm.kernels.reference.rotate_quantize import rotate


def weight_only_linear(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """out[t, n] = sum_k y[t, k] * (code[n, k] - zero[n, g]) * scale[n, g] + bias[n], in the dtype of x.

    y is x [tokens, K] transformed (see `rotate`), in 16-bit codes (see `wide_codes`); weight_packed as
    in the checkpoint with weight_scale and weight_zero [N, groups] (None: signed codes). The product
    is `quantized_linear`'s of the codes' two bytes, added in float32.
    """
    codes, scale, zero = wide_codes(rotate(x.float(), matrices, hadamard))
    bytes_apart = quantized_linear(
        codes, scale, zero, weight_packed, weight_scale, weight_zero, None, dtype=torch.float32
    )
    return add_bytes(bytes_apart, bias, x.dtype)


def wide_codes(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symmetric 16-bit codes of y [tokens, K] float32, a row of high bytes and one of low bytes for each token.

    Returns codes [2 * tokens, K] uint8, scale [2 * tokens, 1] float32, zero [2 * tokens, 1] int32, as an
    8-bit quantizer would. A token's largest magnitude is 32767 steps: finer than bf16 holds it.
    """
    step = (y.abs().amax(1, keepdim=True) / 32767).clamp(min=1e-12)
    codes = torch.round(y * (1 / step)).int() + 32768
    scale = torch.stack((step * 256, step), 1)
    zero = torch.tensor([[128], [0]], dtype=torch.int32).expand(len(y), 2, 1)
    return (
        torch.stack((codes >> 8, codes & 255), 1).flatten(0, 1).to(torch.uint8),
        scale.flatten(0, 1),
        zero.flatten(0, 1),
    )


def add_bytes(products: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Products of high and of low bytes [2 * tokens, N] float32, added, plus the bias: [tokens, N]."""
    high, low = products.unflatten(0, (-1, 2)).unbind(1)
    out = high + low
    return (out if bias is None else out.add_(bias.float())).to(dtype)
