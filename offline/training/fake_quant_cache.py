"""A KV cache whose codes pass gradients, and attention over it, for what learns clip factors."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from offline.algorithms.fake_quantize import fake_store
from offline.algorithms.rotations import hadamard_product
from offline.model.windowed_attention import windowed_attention

ATTENTION = "infoquant_trained_cache"


class TrainedCache(nn.Module):
    """Keys and values of one layer through the codes of the KV cache."""

    def __init__(self, num_bits: tuple[int, int], rotate_keys: bool, key_mean: torch.Tensor | None):
        super().__init__()
        self._num_bits, self._rotate_keys, self._key_mean = num_bits, rotate_keys, key_mean

    def clips(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip factors [kv_heads, 2] of keys and of values."""
        raise NotImplementedError

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or queries [..., head_size] as the scores are computed from."""
        return hadamard_product(x) if self._rotate_keys else x

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[sequences, kv_heads, tokens, head_size] each, as read back from the cache."""
        key_clip_ratio, value_clip_ratio = self.clips()
        key = key if self._key_mean is None else key - self._key_mean[:, None]
        key_bits, value_bits = self._num_bits
        return fake_store(self.rotate(key), key_clip_ratio, key_bits), fake_store(value, value_clip_ratio, value_bits)


def register_attention() -> None:
    """Let transformers find attention over `module.attn`, a `TrainedCache`, under the name ATTENTION."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    cache = module.attn
    assert isinstance(cache, TrainedCache)
    key, value = cache(key, value)
    return windowed_attention(module, cache.rotate(query), key, value, attention_mask, **kwargs)
