"""Attention functions for transformers: how they are registered, and one that makes the mask of its window itself."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

WINDOWED = "infoquant_windowed"


def register_attention(name: str, attention: Callable[..., tuple[torch.Tensor, None]]) -> str:
    """Register an attention function with transformers; returns `name`, for `_attn_implementation` of a config."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def windowed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over whole sequences, causally and within the window if there is one (transformers' attention interface).

    Serves a decoder layer that runs without its model, which would make the mask; a given mask is used as it is.
    query [batch, heads, tokens, head_size]; key, value [batch, kv_heads, tokens, head_size].
    """
    length = key.shape[2]
    if attention_mask is None and sliding_window is not None and sliding_window < length:
        age = torch.arange(length, device=key.device)[:, None] - torch.arange(length, device=key.device)
        attention_mask = ((age >= 0) & (age < sliding_window))[None, None]
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None
