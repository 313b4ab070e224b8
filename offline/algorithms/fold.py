"""Fold norm gains and rotations into weights, in float64 (QuaRot, arXiv 2404.00456, section 4)."""

import torch

from infoquant_vllm.format import ModelShape


def fold_tensor(
    name: str,
    tensor: torch.Tensor,
    gain: torch.Tensor | None,
    residual: torch.Tensor | None,
    heads: torch.Tensor | None,
    shape: ModelShape,
) -> torch.Tensor:
    """Return a tensor of a decoder layer in float32, with the norm's gain and the rotations R1 and R2 folded in.

    The gains of the norms that are folded become 1. None for a rotation is the identity.

    name: inside the layer
    gain: [hidden], of the norm in front of the linear; None for tensors that no gain folds into
    residual: R1, [hidden, hidden] float64
    heads: R2, [kv_heads, head_dim, head_dim] float64
    """
    module, _, kind = name.rpartition(".")
    if module in shape.norm_of.values():
        return torch.ones_like(tensor, dtype=torch.float32)
    tensor = tensor.double()
    if gain is not None:
        tensor = tensor * gain.double()
        tensor = tensor if residual is None else tensor @ residual
    if module in shape.layer_linears and module not in shape.norm_of and residual is not None:
        tensor = residual.T @ tensor if kind == "weight" else tensor @ residual
    return rotate_heads(tensor, name, heads, shape)


def rotate_heads(tensor: torch.Tensor, name: str, heads: torch.Tensor | None, shape: ModelShape) -> torch.Tensor:
    """Rotate the values of each kv-head by R2 [kv_heads, d, d], and o_proj back in each query head; return float32."""
    if heads is None:
        return tensor.float()
    if name == "self_attn.v_proj.weight":
        rows = tensor.double().view(shape.num_key_value_heads, shape.head_dim, -1)
        return (heads.mT @ rows).reshape(tensor.shape).float()
    if name == "self_attn.v_proj.bias":
        return (tensor.double().view(shape.num_key_value_heads, 1, shape.head_dim) @ heads).flatten().float()
    if name == "self_attn.o_proj.weight":
        columns = tensor.double().view(len(tensor), shape.num_attention_heads, shape.head_dim).transpose(0, 1)
        group = shape.num_attention_heads // shape.num_key_value_heads
        return (columns @ heads.repeat_interleave(group, 0)).transpose(0, 1).reshape(tensor.shape).float()
    return tensor.float()


def rotate_rows(matrix: torch.Tensor, rotation: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
    """Return matrix [rows, hidden] @ rotation in the matrix's dtype; computed in float64, `chunk` rows at a time."""
    rotated = torch.empty_like(matrix)
    for rows, out in zip(matrix.split(chunk), rotated.split(chunk), strict=True):
        out.copy_(rows.double() @ rotation)
    return rotated
