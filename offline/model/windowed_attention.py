"""Transformers' attention for a decoder layer that runs without its model, which would make the mask of its window."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "infoquant_windowed"


def register_windowed_attention() -> str:
    """Let transformers find this attention; returns the name for `_attn_implementation`."""
    AttentionInterface.register(ATTENTION, windowed_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    return ATTENTION


def windowed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface, of whole sequences: causal, and within the window where there is one.

    query [batch, heads, tokens, head_size]; key, value [batch, kv_heads, tokens, head_size]. A mask that the
    model made is taken as it is.
    """
    length = key.shape[2]
    if attention_mask is None and sliding_window is not None and sliding_window < length:
        age = torch.arange(length, device=key.device)[:, None] - torch.arange(length, device=key.device)
        attention_mask = ((age >= 0) & (age < sliding_window))[None, None]
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None
