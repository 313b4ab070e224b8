"""Scales moved from one linear to another, which leave the function as it is and lower the noise of rounding.

Inputs x [tokens, K] that are rotated and then rounded get noise in proportion to |x|, alike in all
features; behind the weights W it is in proportion to |x| |W|. With x_j s_j and W_j / s_j in place
of x_j and W_j that product is smallest where s_j^2 = |W_j| / |x_j| (Cauchy and Schwarz).
"""

import torch

from infoquant_vllm.format import ARCHITECTURES, ModelShape
from offline.model.input_statistics import InputStatistics

QKV = "self_attn.q_proj"
"""The linear that the input of queries, keys and values is known by."""
SMALLEST = 1e-6
"""Of norms, as a share of the largest: features that are never used need no scale to match."""


def equalize_layer(
    state: dict[str, torch.Tensor], hessians: dict[str, torch.Tensor], statistics: InputStatistics, shape: ModelShape
) -> None:
    """Balance a layer's weights in place, and what was measured of keys and down_proj; see `fold_layer`."""
    queries, keys = (
        output_energies(state, module, hessians[QKV], statistics.sums[QKV], statistics.tokens[QKV])
        for module in (QKV, "self_attn.k_proj")
    )
    scale, keys_module = equalize_keys(state, queries, keys, shape), ARCHITECTURES[shape.architecture].rope_inputs[1]
    if keys_module in statistics.sums:
        statistics.sums[keys_module] *= scale
    scale = equalize_down(state, statistics.second_moments["mlp.down_proj"])
    for row, factor in zip(hessians["mlp.down_proj"], scale, strict=True):
        row.mul_(scale * factor)
    statistics.scale_samples("mlp.down_proj", scale)


def equalize_keys(
    state: dict[str, torch.Tensor], queries: torch.Tensor, keys: torch.Tensor, shape: ModelShape
) -> torch.Tensor:
    """Scale keys up and queries down, or the reverse, in place; returns the factors of keys [kv_heads * head_dim].

    RoPE turns features i and i + head_dim / 2 together, so both get the same scale. A norm over
    each head would undo the scales of the linear before it; its gain takes them, one for all heads.

    queries, keys: energies [heads * head_dim] of the outputs of q_proj and k_proj
    """
    architecture, kv_heads = ARCHITECTURES[shape.architecture], shape.num_key_value_heads
    query_module, key_module = architecture.rope_inputs
    if architecture.qk_norm:
        queries, keys, kv_heads = _normed(state, query_module, queries), _normed(state, key_module, keys), 1
    pairs = (kv_heads, -1, 2, shape.head_dim // 2)
    scale = _scale(*(x.view(pairs).sum((1, 2)).sqrt() for x in (queries, keys))).repeat(1, 2)
    _scale_rows(state, key_module, scale.flatten())
    group = len(state[f"{query_module}.weight"]) // scale.numel()
    _scale_rows(state, query_module, 1 / scale.repeat_interleave(group, dim=0).flatten())
    return scale.expand(shape.num_key_value_heads, -1).flatten()


def equalize_down(state: dict[str, torch.Tensor], energy: torch.Tensor) -> torch.Tensor:
    """Scale the rows of up_proj against the columns of down_proj in place; returns the factors of down_proj's inputs.

    energy: [intermediate], of each input feature of down_proj, every token counting the same
    """
    weight = state["mlp.down_proj.weight"]
    scale = _scale(weight.norm(dim=0), energy.sqrt())
    state["mlp.down_proj.weight"] = weight / scale
    _scale_rows(state, "mlp.up_proj", scale)
    return scale


def output_energies(
    state: dict[str, torch.Tensor], module: str, hessian: torch.Tensor, sums: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Sums over tokens of the square of each output, bias included, of a linear [N, K]; returns [N].

    Its inputs x are known by their sums of x^T x, `hessian` [K, K], and of x, `sums` [K].
    """
    weight, bias = state[f"{module}.weight"], state.get(f"{module}.bias")
    energy = ((weight @ hessian) * weight).sum(1)
    if bias is not None:
        energy = energy + bias * (2 * (weight @ sums) + tokens * bias)
    return energy.clamp(min=0)


def _normed(state: dict[str, torch.Tensor], norm: str, energies: torch.Tensor) -> torch.Tensor:
    """Energies [heads, head_dim] behind an RMSNorm over each head, which takes all of a head's tokens for alike."""
    heads = energies.view(-1, len(state[f"{norm}.weight"]))
    return heads / heads.mean(1, keepdim=True).clamp(min=1e-30) * state[f"{norm}.weight"].square()


def _scale(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """sqrt(wanted / found) with a geometric mean of 1 along the last axis."""
    wanted, found = (x.clamp(min=SMALLEST * x.max().item() + 1e-30) for x in (wanted, found))
    logarithm = (wanted / found).log() / 2
    return (logarithm - logarithm.mean(-1, keepdim=True)).exp()


def _scale_rows(state: dict[str, torch.Tensor], module: str, scale: torch.Tensor) -> None:
    weight = state[f"{module}.weight"]
    state[f"{module}.weight"] = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    if f"{module}.bias" in state:
        state[f"{module}.bias"] = state[f"{module}.bias"] * scale
