"""Norm gains and rotations folded into the weights, in float64 (QuaRot, arXiv 2404.00456, section 4)."""

import torch

from infoquant_vllm.format import ModelShape
from offline.architectures import Rules, rules_for
from offline.source import Source
from offline.transforms import Transforms


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype that the source keeps its norms in, and whatever else is not quantised."""
    return source.tensor("model.norm.weight").dtype


def fold_layer(source: Source, layer: int, transforms: Transforms | None) -> dict[str, torch.Tensor]:
    """Tensors of one decoder layer by their names inside it, float32, with `transforms` folded in.

    The residual stream's norm weights are 1 then. Weights are still without what undoes the transforms that
    their inputs meet at run time (see `undo_in_weights`). Without transforms these are the source's tensors.
    """
    prefix = f"model.layers.{layer}."
    state = {n.removeprefix(prefix): source.tensor(n).double() for n in source.names if n.startswith(prefix)}
    if transforms is not None:
        rules = rules_for(source.shape)
        _fold_gains(state, rules)
        if transforms.residual is not None:
            _fold_residual(state, transforms.residual, rules)
        if transforms.heads is not None:
            _fold_heads(state, transforms.heads[layer], source.shape)
    return {name: tensor.float() for name, tensor in state.items()}


def fold_ends(source: Source, transforms: Transforms | None) -> dict[str, torch.Tensor]:
    """Embeddings, final norm and lm_head in the source's dtype, with the residual rotation folded in.

    A tied model keeps its matrix; rotation and final norm go along as float32 tensors of their own.
    """
    names = [name for name in source.names if not name.startswith("model.layers.")]
    state = {name: source.tensor(name) for name in names}
    if transforms is None or transforms.residual is None:
        return state
    norm, embed = state["model.norm.weight"], state["model.embed_tokens.weight"]
    state["model.norm.weight"] = torch.ones_like(norm)
    if source.shape.tie_word_embeddings:
        state["model.embed_tokens.residual_rotation"] = transforms.residual.float()
        state["model.embed_tokens.final_norm_weight"] = norm.float()
    else:
        head = state["lm_head.weight"]
        state["model.embed_tokens.weight"] = _rotate_rows(embed, transforms.residual)
        state["lm_head.weight"] = _rotate_rows(head, norm.double()[:, None] * transforms.residual)
    return state


def _fold_gains(state: dict[str, torch.Tensor], rules: Rules) -> None:
    for norm, readers in rules.readers.items():
        gain = state[f"{norm}.weight"]
        for reader in readers:
            state[f"{reader}.weight"] = state[f"{reader}.weight"] * gain
        state[f"{norm}.weight"] = torch.ones_like(gain)


def _fold_residual(state: dict[str, torch.Tensor], rotation: torch.Tensor, rules: Rules) -> None:
    for reader in (reader for readers in rules.readers.values() for reader in readers):
        state[f"{reader}.weight"] = state[f"{reader}.weight"] @ rotation
    for writer in rules.writers:
        state[f"{writer}.weight"] = rotation.T @ state[f"{writer}.weight"]
        if f"{writer}.bias" in state:
            state[f"{writer}.bias"] = state[f"{writer}.bias"] @ rotation


def _fold_heads(state: dict[str, torch.Tensor], heads: torch.Tensor, shape: ModelShape) -> None:
    """Values times their kv-head's rotation [kv_heads, d, d]; o_proj undoes it in each query head."""
    value = state["self_attn.v_proj.weight"]
    rows = value.view(shape.num_key_value_heads, shape.head_dim, -1)
    state["self_attn.v_proj.weight"] = (heads.mT @ rows).reshape(value.shape)
    if "self_attn.v_proj.bias" in state:
        bias = state["self_attn.v_proj.bias"].view(shape.num_key_value_heads, 1, shape.head_dim)
        state["self_attn.v_proj.bias"] = (bias @ heads).flatten()
    output = state["self_attn.o_proj.weight"]
    columns = output.view(len(output), shape.num_attention_heads, 1, shape.head_dim)
    per_query = heads.repeat_interleave(shape.num_attention_heads // shape.num_key_value_heads, dim=0)
    state["self_attn.o_proj.weight"] = (columns @ per_query).reshape(output.shape)


def _rotate_rows(matrix: torch.Tensor, rotation: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
    """matrix [rows, hidden] @ rotation in float64, a few rows at a time, back in its own dtype."""
    return torch.cat([(rows.double() @ rotation).to(matrix.dtype) for rows in matrix.split(chunk)])
