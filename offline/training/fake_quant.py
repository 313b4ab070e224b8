"""Fake quantized modules: they compute with the values that codes stand for, and rounding passes gradients."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from infoquant_vllm.format import KVCacheArgs, LinearScheme
from offline.algorithms.fake_quantize import added_to_product, dequantized_weight, fake_quantize, fake_store
from offline.algorithms.rotations import hadamard_product, transform_input
from offline.model.windowed_attention import register_attention, windowed_attention

ATTENTION = "infoquant_fake_quant"
CLIP_BOUNDS = (0.3, 1.0)
SIGMOID_START = math.log(9)

Tensors = dict[str, torch.Tensor]
"""Tensors of a checkpoint by their names inside a module."""


class FixedClip(nn.Module):
    """Clip ratios [groups, 2] on (minimum, maximum) as the checkpoint has them."""

    def __init__(self, ratio: torch.Tensor):
        super().__init__()
        self.register_buffer("ratio", ratio)

    def forward(self) -> torch.Tensor:
        """Return the ratios."""
        return self.get_buffer("ratio")


class ClampedClip(nn.Module):
    """Clip ratios [groups, 2] that are trained from those of the checkpoint on, within CLIP_BOUNDS."""

    def __init__(self, ratio: torch.Tensor):
        super().__init__()
        self.ratio = nn.Parameter(ratio.clone())

    def forward(self) -> torch.Tensor:
        """Return the ratios."""
        return self.ratio


class SigmoidClip(nn.Module):
    """Clip ratios [groups, 2] that are trained as (1 + sigmoid(logits)) / 2, from 0.95 on."""

    def __init__(self, ratio: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(torch.full(ratio.shape, SIGMOID_START))

    def forward(self) -> torch.Tensor:
        """Return the ratios."""
        return (1 + self.logits.sigmoid()) / 2


Clip = Callable[[torch.Tensor], nn.Module]
"""One of the classes above."""


class FakeQuantInput(nn.Module):
    """Input transform and activation quantizer of the linears that share an input."""

    def __init__(self, scheme: LinearScheme, tensors: Tensors, clip: Clip):
        super().__init__()
        self._scheme = scheme
        self._matrices = {name: tensors[name] for name in tensors if name.startswith("input_")}
        ratio, self._mean = (self._matrices.pop(name, None) for name in ("input_clip_ratio", "input_mean"))
        self.clip = None if ratio is None else clip(ratio)
        self._seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform and quantize x [..., K] float32; computed once for the linears that pass the same tensor."""
        if self._seen is not x:
            self._seen, self._quantized = x, self._quantize(x)
        return self._quantized

    def forget(self) -> None:
        """Drop the last input: the same tensor may enter again after a step of training."""
        self._seen = None

    def _quantize(self, x: torch.Tensor) -> torch.Tensor:
        transform, args = self._scheme.input_transform, self._scheme.input_activations
        y = transform_input(x.flatten(0, -2), transform, self._matrices, hadamard_product).view(x.shape)
        y = y if self._mean is None else y - self._mean
        return y if self.clip is None else fake_quantize(y.contiguous(), self.clip(), args)


class FakeQuantLinear(nn.Module):
    """A linear with dequantized weights, whose rows are multiplied by exp(log_scale) [N] if `train_scale`.

    One factor per row suffices: one for each group of a row overfits the calibration text (docs/method.md).
    """

    bias: torch.Tensor | None

    def __init__(self, shared_input: FakeQuantInput, scheme: LinearScheme, tensors: Tensors, train_scale: bool):
        super().__init__()
        self.input = shared_input
        self.register_buffer("weight_scale", tensors["weight_scale"])
        self.register_buffer("weight", dequantized_weight(tensors, scheme.weights))
        bias = added_to_product(tensors)
        self.register_buffer("bias", None if bias is None else bias.float())
        self.log_scale = nn.Parameter(torch.zeros(len(tensors["weight_scale"]))) if train_scale else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., K] float32 to [..., N]."""
        x, weight = self.input(x), self.get_buffer("weight")
        if self.log_scale is None:
            return functional.linear(x, weight, self.bias)
        out = functional.linear(x, weight) * self.log_scale.exp()
        return out if self.bias is None else out + self.bias

    def scale(self) -> torch.Tensor:
        """Return the scales [N, 1] as the checkpoint stores them."""
        scale = self.get_buffer("weight_scale")
        return scale if self.log_scale is None else scale * self.log_scale.exp()[:, None]


class FakeQuantKVCache(nn.Module):
    """Keys and values of one layer as read back from the quantized cache; attention over it is ATTENTION."""

    key_mean: torch.Tensor | None
    key_feedback: torch.Tensor | None

    def __init__(self, args: KVCacheArgs, tensors: Tensors, key_clip: Clip, value_clip: Clip):
        super().__init__()
        self._num_bits, self._rotate_keys = args.num_bits, args.key_transform == "hadamard"
        self.register_buffer("key_mean", tensors.get("key_mean"))
        self.register_buffer("key_feedback", tensors.get("key_feedback"))
        self.key_clip, self.value_clip = key_clip(tensors["key_clip_ratio"]), value_clip(tensors["value_clip_ratio"])
        register_attention(ATTENTION, _attention)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply R3 to keys or queries [..., head_size]."""
        return hadamard_product(x) if self._rotate_keys else x

    def forward(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize and dequantize key and value, [sequences, kv_heads, tokens, head_size] each."""
        key = key if self.key_mean is None else key - self.key_mean[:, None]
        key_bits, value_bits = self._num_bits
        key = fake_store(self.rotate(key), self.key_clip(), key_bits, self.key_feedback)
        return key, fake_store(value, self.value_clip(), value_bits)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over `module.attn`, a `FakeQuantKVCache` (transformers' attention interface)."""
    cache = module.attn
    assert isinstance(cache, FakeQuantKVCache)
    key, value = cache(key, value)
    return windowed_attention(module, cache.rotate(query), key, value, attention_mask, **kwargs)
