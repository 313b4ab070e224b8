"""Read the source's weights with norm gains and rotations folded in."""

from collections.abc import Iterator

import torch

from offline.algorithms.fold import fold_tensor, rotate_heads, rotate_rows
from offline.algorithms.rotations import Transforms
from offline.model.source import Source


def fold_layer(source: Source, layer: int, transforms: Transforms | None) -> dict[str, torch.Tensor]:
    """Return the tensors of a decoder layer by their names inside it, float32, with `transforms` folded in.

    The gains of the residual stream's norms are 1 then, unless R2 is all there is. The inverses of the transforms that
    apply to inputs at run time are not in the weights yet (see `undo_in_weights`). Without transforms these are the
    source's tensors. Those of experts that a router chooses are left out (see `fold_expert`).
    """
    return _fold(source, layer, "", transforms)


def fold_expert(source: Source, layer: int, expert: int, transforms: Transforms | None) -> dict[str, torch.Tensor]:
    """Return the tensors of one of a layer's experts by their names inside the layer, as `fold_layer` does."""
    assert source.shape.experts is not None
    return _fold(source, layer, source.shape.experts.expert(expert), transforms)


def _fold(source: Source, layer: int, part: str, transforms: Transforms | None) -> dict[str, torch.Tensor]:
    """Fold the tensors of an expert, or where `part` is empty those of the layer outside of its experts."""
    prefix, shape = f"model.layers.{layer}.", source.shape
    found = source.layer_names(layer, part)
    if transforms is None:
        return {name: source.tensor(prefix + name).float() for name in found}
    heads = None if transforms.heads is None else transforms.heads[layer]
    if transforms.residual is None and not transforms.inputs:
        return {name: rotate_heads(source.tensor(prefix + name), name, heads, shape) for name in found}
    gains = {norm: source.tensor(f"{prefix}{norm}.weight") for norm in set(shape.norm_of.values())}
    return {
        name: fold_tensor(
            name,
            source.tensor(prefix + name),
            gains.get(shape.norm_of.get(name.removesuffix(".weight"), "")),
            transforms.residual,
            heads,
            shape,
        )
        for name in found
    }


def fold_embeddings(source: Source, transforms: Transforms | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield embeddings, final norm and lm_head in the source's dtype, with the residual rotation folded in.

    A tied model keeps its matrix; rotation and final norm become float32 tensors of their own.
    """
    residual = None if transforms is None else transforms.residual
    norm, tied = source.tensor("model.norm.weight"), source.shape.tie_word_embeddings
    for name in source.names:
        if name == "model.norm.weight":
            yield name, norm if residual is None else torch.ones_like(norm)
        elif name == "model.embed_tokens.weight":
            embeddings = source.tensor(name)
            yield name, embeddings if residual is None or tied else rotate_rows(embeddings, residual)
        elif name == "lm_head.weight":
            head = source.tensor(name)
            yield name, head if residual is None else rotate_rows(head, norm.double()[:, None] * residual)
    if residual is not None and tied:
        yield "model.embed_tokens.r1", residual.float()
        yield "model.embed_tokens.final_norm_weight", norm.float()
