"""Turn a LoRA adapter into the basis that a checkpoint's weights were folded into, in float64.

An adapter adds y += B A x to a linear (Hu et al., arXiv 2106.09685). Where folding made W into D W C, the adapter's
share of it is D B A C, so A becomes A C and B becomes D B, exactly. What applies to inputs at run time (R4, learned
blocks) is not folded: vLLM gives an adapter the input of the linear before it.
"""

from collections.abc import Mapping

import torch

from infoquant_vllm.format import DOWN_SCALE, FUSED, KEY_SCALE, R1, R2, SITE_NORMS, SITES, ModelShape
from offline.algorithms.fold import rotate_heads

QUERY, KEY, VALUE, OUT, DOWN, UP = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"),
)


def turn(
    linear: str, a: torch.Tensor, b: torch.Tensor, basis: Mapping[str, torch.Tensor], shape: ModelShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [rank, K] and B [N, rank] of a linear in the checkpoint's basis, float64.

    linear: its name inside the decoder layer; of one that the source fuses too
    basis: tensors of the layer, see `AdapterBasis.layer`
    """
    parts = FUSED.get(linear, (linear,))
    rows = [shape.layer_linears[part][0] for part in parts]
    turned = [_turn_output(part, own, basis, shape) for part, own in zip(parts, b.double().split(rows), strict=True)]
    return _turn_input(parts[0], a.double(), basis, shape), torch.cat(turned)


def _turn_input(linear: str, a: torch.Tensor, basis: Mapping[str, torch.Tensor], shape: ModelShape) -> torch.Tensor:
    if linear == OUT:
        return rotate_heads(a, f"{OUT}.weight", _double(basis, R2), shape).double()
    if linear == DOWN:
        return a / basis[DOWN_SCALE].double() if DOWN_SCALE in basis else a
    site = next(site for site, linears in SITES.items() if linear in linears)
    gain, residual = _double(basis, f"{SITE_NORMS[site]}.weight"), _double(basis, R1)
    a = a if gain is None else a * gain
    return a if residual is None else a @ residual


def _turn_output(linear: str, b: torch.Tensor, basis: Mapping[str, torch.Tensor], shape: ModelShape) -> torch.Tensor:
    if linear in (OUT, DOWN):
        residual = _double(basis, R1)
        return b if residual is None else residual.T @ b
    if linear == VALUE:
        return rotate_heads(b, f"{VALUE}.weight", _double(basis, R2), shape).double()
    if linear in (QUERY, KEY) and KEY_SCALE in basis:
        scale, group = basis[KEY_SCALE].double(), shape.num_attention_heads // shape.num_key_value_heads
        return b * (scale.flatten() if linear == KEY else 1 / scale.repeat_interleave(group, 0).flatten())[:, None]
    if linear == UP and DOWN_SCALE in basis:
        return b * basis[DOWN_SCALE].double()[:, None]
    return b


def _double(basis: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    return basis[name].double() if name in basis else None
