"""Scales moved from one linear to another, which leave the function as it is and lower the noise of rounding.

Inputs x [tokens, K] that are rotated and then rounded get noise in proportion to |x|, alike in all
features; behind the weights W it is in proportion to |x| |W|. With x_j s_j and W_j / s_j in place
of x_j and W_j that product is smallest where s_j^2 = |W_j| / |x_j| (Cauchy and Schwarz).
"""

import torch

from infoquant_vllm.format import ModelShape

SMALLEST = 1e-6
"""Of norms, as a share of the largest: features that are never used need no scale to match."""


def balance_layer(
    state: dict[str, torch.Tensor],
    hessians: dict[str, torch.Tensor],
    energies: dict[str, torch.Tensor],
    shape: ModelShape,
) -> None:
    """Balance a layer's weights in place, and the Hessians with them; see `Statistics` and `fold_layer`."""
    balance_keys(state, hessians["self_attn.q_proj"], shape)
    hessians["mlp.down_proj"] = balance_down(state, hessians["mlp.down_proj"], energies["mlp.down_proj"])


def balance_keys(state: dict[str, torch.Tensor], hessian: torch.Tensor, shape: ModelShape) -> None:
    """Scale keys up and queries down, or the reverse, in place; `hessian` is that of their input.

    RoPE turns features i and i + head_dim / 2 together, so both get the same scale.
    """
    pairs = (shape.num_key_value_heads, -1, 2, shape.head_dim // 2)
    queries, keys = (
        _energy(state[f"self_attn.{name}.weight"], hessian).view(pairs).sum((1, 2)).sqrt()
        for name in ("q_proj", "k_proj")
    )
    scale = _scale(queries, keys).repeat(1, 2)
    group = shape.num_attention_heads // shape.num_key_value_heads
    _scale_rows(state, "self_attn.k_proj", scale.flatten())
    _scale_rows(state, "self_attn.q_proj", 1 / scale.repeat_interleave(group, dim=0).flatten())


def balance_down(state: dict[str, torch.Tensor], hessian: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """Scale the rows of up_proj against the columns of down_proj in place; returns down_proj's new Hessian.

    energy: [intermediate], of each input feature of down_proj, every token counting the same
    """
    weight = state["mlp.down_proj.weight"]
    scale = _scale(weight.norm(dim=0), energy.sqrt())
    state["mlp.down_proj.weight"] = weight / scale
    _scale_rows(state, "mlp.up_proj", scale)
    return hessian * scale * scale[:, None]


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each output of `weight` [N, K] over the inputs that `hessian` [K, K] sums up."""
    return ((weight @ hessian) * weight).sum(1).clamp(min=0)


def _scale(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """sqrt(wanted / found) with a geometric mean of 1 along the last axis."""
    wanted, found = (x.clamp(min=SMALLEST * x.max().item() + 1e-30) for x in (wanted, found))
    logarithm = (wanted / found).log() / 2
    return (logarithm - logarithm.mean(-1, keepdim=True)).exp()


def _scale_rows(state: dict[str, torch.Tensor], module: str, scale: torch.Tensor) -> None:
    state[f"{module}.weight"] = state[f"{module}.weight"] * scale[:, None]
    if f"{module}.bias" in state:
        state[f"{module}.bias"] = state[f"{module}.bias"] * scale
