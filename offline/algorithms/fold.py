"""Norm gains and rotations folded into the weights, in float64 (QuaRot, arXiv 2404.00456, section 4)."""

from collections.abc import Iterator

import torch

from infoquant_vllm.format import ROW_PARALLEL_SITES, SITE_NORMS, SITES, ModelShape
from offline.algorithms.rotations import Transforms
from offline.model.source import Source


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype that the source keeps its norms in, and whatever else is not quantized."""
    return source.dtype("model.norm.weight")


def fold_layer(source: Source, layer: int, transforms: Transforms | None) -> dict[str, torch.Tensor]:
    """Tensors of one decoder layer by their names inside it, float32, with `transforms` folded in.

    The residual stream's norm weights are 1 then. Weights are still without what undoes the transforms that
    their inputs meet at run time (see `undo_in_weights`). Without transforms these are the source's tensors.
    """
    prefix = f"model.layers.{layer}."
    names = [name.removeprefix(prefix) for name in source.names if name.startswith(prefix)]
    if transforms is None:
        return {name: source.tensor(prefix + name).float() for name in names}
    residual, writers = transforms.residual, [linear for site in ROW_PARALLEL_SITES for linear in SITES[site]]
    heads = None if transforms.heads is None else transforms.heads[layer]
    gains = {r: source.tensor(f"{prefix}{norm}.weight") for site, norm in SITE_NORMS.items() for r in SITES[site]}
    state = {}
    for name in names:  # in float64 there is one tensor at a time
        module, _, kind = name.rpartition(".")
        tensor = source.tensor(prefix + name).double()
        if module in SITE_NORMS.values():
            tensor = torch.ones_like(tensor)
        if module in gains and kind == "weight":
            tensor = tensor * gains[module].double()
            tensor = tensor if residual is None else tensor @ residual
        if module in writers and residual is not None:
            tensor = residual.T @ tensor if kind == "weight" else tensor @ residual
        if heads is not None:
            tensor = _fold_heads(tensor, name, heads, source.shape)
        state[name] = tensor.float()
    return state


def fold_ends(source: Source, transforms: Transforms | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Embeddings, final norm and lm_head in the source's dtype, with the residual rotation folded in, one by one.

    A tied model keeps its matrix; rotation and final norm go along as float32 tensors of their own.
    """
    residual = None if transforms is None else transforms.residual
    norm, tied = source.tensor("model.norm.weight"), source.shape.tie_word_embeddings
    for name in source.names:
        if name == "model.norm.weight":
            yield name, norm if residual is None else torch.ones_like(norm)
        elif name == "model.embed_tokens.weight":
            embed = source.tensor(name)
            yield name, embed if residual is None or tied else _rotate_rows(embed, residual)
        elif name == "lm_head.weight":
            head = source.tensor(name)
            yield name, head if residual is None else _rotate_rows(head, norm.double()[:, None] * residual)
    if residual is not None and tied:
        yield "model.embed_tokens.r1", residual.float()
        yield "model.embed_tokens.final_norm_weight", norm.float()


def _fold_heads(tensor: torch.Tensor, name: str, heads: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """Values times their kv-head's rotation [kv_heads, d, d]; o_proj undoes it in each query head."""
    if name == "self_attn.v_proj.weight":
        rows = tensor.view(shape.num_key_value_heads, shape.head_dim, -1)
        return (heads.mT @ rows).reshape(tensor.shape)
    if name == "self_attn.v_proj.bias":
        return (tensor.view(shape.num_key_value_heads, 1, shape.head_dim) @ heads).flatten()
    if name == "self_attn.o_proj.weight":
        columns = tensor.view(len(tensor), shape.num_attention_heads, shape.head_dim).transpose(0, 1)
        per_query = heads.repeat_interleave(shape.num_attention_heads // shape.num_key_value_heads, dim=0)
        return (columns @ per_query).transpose(0, 1).reshape(tensor.shape)
    return tensor


def _rotate_rows(matrix: torch.Tensor, rotation: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
    """matrix [rows, hidden] @ rotation in float64, a few rows at a time, back in its own dtype."""
    rotated = torch.empty_like(matrix)
    for rows, out in zip(matrix.split(chunk), rotated.split(chunk), strict=True):
        out.copy_(rows.double() @ rotation)
    return rotated
