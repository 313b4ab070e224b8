"""Attention functions for transformers: how they are registered, and one that makes the mask of its window itself."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

WINDOWED = "infoquant_windowed"


def register_attention(name: str, attention: Callable[..., tuple[torch.Tensor, None]]) -> str:
    """Register an attention function with transformers; returns `name`, for `_attn_implementation` of a config."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def attention_of(config: PreTrainedConfig) -> str:
    """Return the attention for a model of transformers: its own by SDPA, which ignores soft caps, or one with them."""
    if getattr(config, "attn_logit_softcapping", None) is None:
        return "sdpa"
    return register_attention(WINDOWED, windowed_attention)


def windowed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over whole sequences, causally and within the window if there is one (transformers' attention interface).

    Serves a decoder layer that runs without its model, which would make the mask; a given mask is used as it is. A soft
    cap bounds the scores.
    query [batch, heads, tokens, head_size]; key, value [batch, kv_heads, tokens, head_size].
    """
    length = key.shape[2]
    if attention_mask is None and sliding_window is not None and sliding_window < length:
        age = torch.arange(length, device=key.device)[:, None] - torch.arange(length, device=key.device)
        attention_mask = ((age >= 0) & (age < sliding_window))[None, None]
    if softcap is not None:
        queries = query.shape[2]
        if attention_mask is None and queries > 1:
            attention_mask = query.new_ones(queries, length, dtype=torch.bool).tril(length - queries)
        out = soft_capped_attention(query, key, value, attention_mask, kwargs["scaling"], softcap)
    else:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None


def soft_capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    soft_cap: float,
) -> torch.Tensor:
    """Attend with scores s counted as soft_cap * tanh(s / soft_cap) (Gemma 2, 2024, section 2).

    Returns [batch, tokens, heads, head_size] for query [batch, heads, tokens, head_size] and key, value [batch,
    kv_heads, all tokens, head_size]. The mask is bool and broadcasts to [batch, 1, tokens, all tokens], True where a
    query sees a key; None: all see all.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key[:, :, None].mT).float() * scaling
    scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~(mask if mask.dim() < 4 else mask[:, :, None]), -torch.inf)
    weights = scores.softmax(-1).to(query.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2).transpose(1, 2)
