"""Read the source's weights with norm gains and rotations folded in."""

from collections.abc import Iterator

import torch

from offline.algorithms.fold import fold_tensor, norm_of_linears, rotate_heads, rotate_rows
from offline.algorithms.rotations import Transforms
from offline.model.source import Source


def fold_layer(source: Source, layer: int, transforms: Transforms | None) -> dict[str, torch.Tensor]:
    """Return the tensors of a decoder layer by their names inside it, float32, with `transforms` folded in.

    The gains of the residual stream's norms are 1 then, unless R2 is all there is. The inverses of the transforms that
    apply to inputs at run time are not in the weights yet (see `undo_in_weights`). Without transforms these are the
    source's tensors.
    """
    prefix = f"model.layers.{layer}."
    names = [name.removeprefix(prefix) for name in source.names if name.startswith(prefix)]
    if transforms is None:
        return {name: source.tensor(prefix + name).float() for name in names}
    heads = None if transforms.heads is None else transforms.heads[layer]
    if transforms.residual is None and not transforms.inputs:
        return {name: rotate_heads(source.tensor(prefix + name), name, heads, source.shape) for name in names}
    norms = norm_of_linears(source.shape)
    gains = {f"{linear}.weight": source.tensor(f"{prefix}{norm}.weight") for linear, norm in norms.items()}
    return {
        name: fold_tensor(name, source.tensor(prefix + name), gains.get(name), transforms.residual, heads, source.shape)
        for name in names
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
