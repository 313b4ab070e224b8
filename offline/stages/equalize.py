"""Equalize a decoder layer: queries against keys, up_proj against down_proj (see `algorithms/equalize.py`)."""

from typing import NamedTuple

import torch

from infoquant_vllm.format import ARCHITECTURES, DOWN_SCALE, KEY_SCALE, ModelShape
from offline.algorithms.equalize import down_scales, key_scales, normed_moments, output_moments
from offline.model.hidden_states import OUTPUT
from offline.model.input_statistics import InputStatistics

QKV = "self_attn.q_proj"
"""The module that the statistics of the input of queries, keys and values have the name of."""


class Scales(NamedTuple):
    """What a layer was equalized by.

    keys: [kv_heads * head_dim], of keys; queries have the inverse
    folded: those in rows of linears, by their names in the basis of adapters (see `AdapterBasis`)
    """

    keys: torch.Tensor
    folded: dict[str, torch.Tensor]


def equalize_layer(
    state: dict[str, torch.Tensor], hessians: dict[str, torch.Tensor], statistics: InputStatistics, shape: ModelShape
) -> Scales:
    """Scale a layer's weights (see `fold_layer`) in place, and the statistics of keys and of down_proj with them."""
    queries, keys = (
        output_moments(
            state[f"{module}.weight"],
            state.get(f"{module}.bias"),
            hessians[QKV],
            statistics.sums[QKV],
            statistics.tokens[QKV],
        )
        for module in (QKV, "self_attn.k_proj")
    )
    key_scale, (_, keys_module) = equalize_keys(state, queries, keys, shape), _rope_inputs(shape)
    if keys_module + OUTPUT in statistics.sums:
        statistics.sums[keys_module + OUTPUT] *= key_scale
    folded = {KEY_SCALE: key_scale.view(shape.num_key_value_heads, -1)} if keys_module.endswith("proj") else {}
    for site, (down, *_) in shape.sites.items():
        if site.endswith("down") and f"{down}.weight" in state:
            up = shape.sites[f"{site.removesuffix('down')}gate_up"][1]
            folded[DOWN_SCALE] = equalize_mlp(state, hessians, statistics, up, down)
    return Scales(key_scale, folded)


def equalize_mlp(
    state: dict[str, torch.Tensor], hessians: dict[str, torch.Tensor], statistics: InputStatistics, up: str, down: str
) -> torch.Tensor:
    """Scale the rows of the linear `up` and inversely the columns of `down`, and the statistics of `down`.

    Returns the scales of the rows.
    """
    scale = equalize_down(state, statistics.second_moments[down], up, down)
    for row, factor in zip(hessians[down], scale, strict=True):
        row.mul_(scale * factor)
    statistics.scale(down, scale)
    return scale


def equalize_keys(
    state: dict[str, torch.Tensor], queries: torch.Tensor, keys: torch.Tensor, shape: ModelShape
) -> torch.Tensor:
    """Scale keys and inversely queries, in place; returns the scales of keys [kv_heads * head_dim].

    A norm would mix scales of the linear before it; its gain takes them, one for all heads if it sees one at a time.

    queries, keys: second moments [heads * head_dim] of the outputs of q_proj and k_proj
    """
    (query_module, key_module), kv_heads = _rope_inputs(shape), shape.num_key_value_heads
    norm = ARCHITECTURES[shape.architecture].qk_norm
    offset = shape.norm_offset if norm != "none" else 0
    if norm != "none":
        queries = normed_moments(queries, state[f"{query_module}.weight"] + offset)
        keys = normed_moments(keys, state[f"{key_module}.weight"] + offset)
        kv_heads = 1 if norm == "head" else kv_heads
    scale = key_scales(queries, keys, kv_heads, shape.head_dim, shape.rotary_dim)
    _scale_rows(state, key_module, scale.flatten(), offset)
    group = len(state[f"{query_module}.weight"]) // scale.numel()
    _scale_rows(state, query_module, 1 / scale.repeat_interleave(group, dim=0).flatten(), offset)
    return scale.expand(shape.num_key_value_heads, -1).flatten()


def equalize_down(
    state: dict[str, torch.Tensor], second_moments: torch.Tensor, up: str = "mlp.up_proj", down: str = "mlp.down_proj"
) -> torch.Tensor:
    """Scale the rows of the linear `up`, and inversely the columns of `down`, in place; returns the scales of inputs.

    second_moments: [intermediate], of the inputs of `down`
    """
    scale = down_scales(state[f"{down}.weight"], second_moments)
    state[f"{down}.weight"] = state[f"{down}.weight"] / scale
    _scale_rows(state, up, scale)
    return scale


def _rope_inputs(shape: ModelShape) -> tuple[str, str]:
    return ARCHITECTURES[shape.architecture].rope_inputs


def _scale_rows(state: dict[str, torch.Tensor], module: str, scale: torch.Tensor, offset: int = 0) -> None:
    """Scale the rows of a linear, or the gain of a norm, which is its weight and `offset`."""
    weight = state[f"{module}.weight"]
    state[f"{module}.weight"] = (weight + offset) * scale.view(-1, *[1] * (weight.dim() - 1)) - offset
    if f"{module}.bias" in state:
        state[f"{module}.bias"] = state[f"{module}.bias"] * scale
