"""Product of an unquantised input with quantised weights."""

import torch

from infoquant_vllm.format import unpack_codes
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

    y is x [tokens, K] transformed (see `rotate`), rounded to the dtype of x;
    weight_packed as in the checkpoint with weight_scale and weight_zero [N, groups] (None: signed
    codes). Everything else is in float64 and rounded once, so that the order of the sum shows in no
    more than a last bit in many millions of float32 results.
    """
    features = x.shape[1]
    y = rotate(x.float(), matrices, hadamard).to(x.dtype)
    num_bits, group_size = 8 * weight_packed.shape[1] // features, features // weight_scale.shape[1]
    weight = unpack_codes(weight_packed, num_bits, signed=weight_zero is None).double()
    if weight_zero is not None:
        weight -= weight_zero.repeat_interleave(group_size, 1)
    weight *= weight_scale.repeat_interleave(group_size, 1)
    out = y.double() @ weight.T
    return (out if bias is None else out + bias).to(x.dtype)
