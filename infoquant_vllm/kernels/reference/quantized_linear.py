"""Product of quantized activations with quantized weights."""

import torch

from infoquant_vllm.format import unpack_codes


def quantized_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """out[t, n] = sum_g scale[t, g] * weight_scale[n, g] * (integer product within g) + bias[n].

    codes [tokens, K] uint8 with scale and zero [tokens, Ga]; weight_packed as in the checkpoint
    with weight_scale and weight_zero [N, Gw] (None: signed codes). The integer products are exact;
    they are scaled and summed in float32 over the finer of both groupings, in order of K. The order
    of the roundings is part of the meaning, since last bits decide about later layers' codes: a
    group's weight scale, its activation scale, the sum, and at the end a channel's weight scale.
    """
    features = codes.shape[1]
    num_bits = 8 * weight_packed.shape[1] // features
    weight = unpack_codes(weight_packed, num_bits, signed=weight_zero is None).long()
    if weight_zero is not None:
        weight = weight - weight_zero.long().repeat_interleave(features // weight_zero.shape[1], 1)
    centered = codes.long() - zero.long().repeat_interleave(features // zero.shape[1], 1)
    groups = max(scale.shape[1], weight_scale.shape[1])
    out = torch.zeros(len(codes), len(weight))
    for g in range(groups):
        part = slice(g * features // groups, (g + 1) * features // groups)
        exact = centered[:, part] @ weight[:, part].T
        a, w = g * scale.shape[1] // groups, g * weight_scale.shape[1] // groups
        term = exact.float() if weight_scale.shape[1] == 1 else exact.float() * weight_scale[:, w]
        out += term * scale[:, a, None]
    if weight_scale.shape[1] == 1:
        out *= weight_scale[:, 0]
    return (out if bias is None else out + bias.float()).to(dtype)
