"""Modules that compute what the server computes, in plain torch but for attention and the residual rotation."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from infoquant_vllm.format import (
    ActivationArgs,
    KVCacheArgs,
    LinearScheme,
    WeightArgs,
    apply_hadamard,
    kv_bytes_per_token_head,
    unpack_codes,
)
from infoquant_vllm.kernels.dispatch import backend
from infoquant_vllm.kernels.operands import KVCalibration, KVScheme, ScoreParams, Sequences
from infoquant_vllm.kernels.torch.kv_cache import SUB_BLOCK
from offline.algorithms.rotations import transform_input

EXACT_FLOAT32 = 2**24
"""Sums of integers up to here are exact in float32, whatever their order."""
SMALLEST_SCALE = 1e-12
SMALLEST_CACHE_SCALE = 2.0**-20
LARGEST_HALF = 65504.0


def quantize_input(y: torch.Tensor, args: ActivationArgs, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes less their zero points, [tokens, K] float32 whole numbers, and scales [tokens, groups].

    Args:
        y: [tokens, K] float32.
        args: bits and symmetry; the groups are those of `clip`.
        clip: [groups, 2] float32, factors on a group's (minimum, maximum).
    """
    grouped = y.unflatten(1, (len(clip), -1))
    smallest, greatest = torch.aminmax(grouped, dim=-1, keepdim=True)
    low, high = smallest.clamp(max=0) * clip[:, :1], greatest.clamp(min=0) * clip[:, 1:]
    largest = 2**args.num_bits - 1
    if args.symmetric:
        half = 2 ** (args.num_bits - 1)
        scale = (torch.maximum(-low, high) / (half - 1)).clamp(min=SMALLEST_SCALE)
        zero = torch.full_like(scale, half)
    else:
        scale = ((high - low) / largest).clamp(min=SMALLEST_SCALE)
        zero = torch.round(-low * (1 / scale))
    codes = (grouped * (1 / scale)).round_().clamp_(-zero, largest - zero)
    return codes.flatten(1), scale.squeeze(-1)


def wide_input(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symmetric 16-bit codes 256 * high + low of y [tokens, K] float32: both [tokens, K], and scales [tokens, 1]."""
    scale = (y.abs().amax(1, keepdim=True) / 32767).clamp(min=SMALLEST_SCALE)
    codes = (y * (1 / scale)).round_()
    high = (codes / 256).floor_()
    return high, codes - 256 * high, scale


def integer_weights(tensors: dict[str, torch.Tensor], args: WeightArgs) -> torch.Tensor:
    """Codes less their zero points, [N, K]: int8, or int16 for asymmetric 8-bit codes."""
    codes = unpack_codes(tensors["weight_packed"], args.num_bits, signed=args.symmetric)
    if args.symmetric:
        return codes
    zeros = tensors["weight_zero_point"].to(torch.int16)
    centered = (codes.to(torch.int16).unflatten(1, (zeros.shape[1], -1)) - zeros[:, :, None]).flatten(1)
    return centered if args.num_bits == 8 else centered.to(torch.int8)


def dequantized_weight(tensors: dict[str, torch.Tensor], args: WeightArgs) -> torch.Tensor:
    """What a linear's codes stand for, [N, K] float32."""
    scale = tensors["weight_scale"]
    codes = integer_weights(tensors, args).unflatten(1, (scale.shape[1], -1))
    return (codes * scale[:, :, None]).flatten(1)


class SimulatedLinear(nn.Module):
    """A quantized linear: input transform, activation codes, exact integer product, scales."""

    def __init__(self, scheme: LinearScheme, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.scheme = scheme
        self.register_buffer("integers", integer_weights(tensors, scheme.weights))
        for name, tensor in tensors.items():
            if name not in ("weight_packed", "weight_zero_point"):
                self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] in the model's dtype to [..., N] in the same."""
        y = transform_input(x.flatten(0, -2).float(), self.scheme.input_transform, dict(self.named_buffers()))
        args = self.scheme.input_activations
        if args.num_bits == 16:
            high, low, scale = wide_input(y)
            out = self._product(high, 256 * scale) + self._product(low, scale)
        else:
            out = self._product(*quantize_input(y, args, self.get_buffer("input_clip_ratio")))
        bias = dict(self.named_buffers()).get("bias")
        out = out if bias is None else out + bias.float()
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    def _product(self, a: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Sum over the groups common to activations and weights, each an exact sum of integers.

        Roundings come in the server's order, since a last bit may decide about a later layer's
        code: a group's weight scale, its activation scale, the sum, a channel's weight scale.
        """
        integers, weight_scale = self.get_buffer("integers"), self.get_buffer("weight_scale")
        features, grouped = a.shape[1], weight_scale.shape[1] > 1
        size = math.gcd(features // scale.shape[1], features // weight_scale.shape[1])
        dtype = self._dtype(size)
        out = a.new_zeros(len(a), len(integers))
        for start in range(0, features, size):
            product = a[:, start : start + size].to(dtype) @ integers[:, start : start + size].to(dtype).T
            term = product.float()
            if grouped:
                term *= weight_scale[:, start * weight_scale.shape[1] // features]
            out += term * scale[:, start * scale.shape[1] // features, None]
        return out if grouped else out * weight_scale[:, 0]

    def _dtype(self, size: int) -> torch.dtype:
        """The cheapest dtype in which sums of `size` products of codes are exact."""
        bound = size * 2 ** (min(self.scheme.input_activations.num_bits, 8) + self.scheme.weights.num_bits)
        return torch.float32 if bound <= EXACT_FLOAT32 else torch.float64


class SimulatedNorm(nn.Module):
    """RMS norm as the server's: in float64, rounded once before the gain."""

    def __init__(self, weight: nn.Parameter, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] to the same shape and dtype."""
        wide = x.double()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return normal.float().to(x.dtype) * self.weight


class SimulatedSilu(nn.Module):
    """SiLU as the server's: in float64, rounded once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [...] to the same shape and dtype."""
        return functional.silu(x.double()).float().to(x.dtype)


class RotatedEmbedding(nn.Module):
    """Rows of a tied embedding brought into the rotated residual basis, by the server's kernel."""

    def __init__(self, weight: nn.Parameter, rotation: torch.Tensor):
        super().__init__()
        self.weight = weight
        self.register_buffer("rotation", rotation)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] to rows [..., hidden] in the model's dtype."""
        return _rotate_rows(functional.embedding(ids, self.weight), self.get_buffer("rotation"), None)


class RotatedHead(nn.Module):
    """A tied lm_head: back to the embedding's basis, the folded final norm, the product with the vocabulary."""

    def __init__(self, product: nn.Module, rotation: torch.Tensor, final_norm: torch.Tensor):
        super().__init__()
        self.product = product
        self.register_buffer("back", rotation.T.contiguous())
        self.register_buffer("final_norm", final_norm)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] in the model's dtype to logits [..., vocab] in the same."""
        return self.product(_rotate_rows(hidden, self.get_buffer("back"), self.get_buffer("final_norm")))


def _rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    return backend("cpu").rotate_rows(rows.flatten(0, -2), rotation, gain).view(rows.shape)


class SimulatedCache(nn.Module):
    """One layer's KV cache, from its tensors in the checkpoint."""

    def __init__(self, args: KVCacheArgs, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.num_bits, self.rotate_keys = args.num_bits, args.key_transform == "hadamard"
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or queries [..., head_size] as the scores are computed from, float32."""
        return apply_hadamard(x.float()) if self.rotate_keys else x.float()

    def prepared(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [..., kv_heads, tokens, head_size] as they are quantized: less their offset, and rotated."""
        return self.rotate(keys if self._key_mean is None else keys.float() - self._key_mean[:, None])

    @property
    def _key_mean(self) -> torch.Tensor | None:
        return dict(self.named_buffers()).get("key_mean")

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """Causal attention by the server's kernels, [batch, tokens, heads, head_size] in the dtype of query.

        query [batch, heads, tokens, head_size]; key, value [batch, kv_heads, all tokens, head_size];
        window: how many tokens a query sees, itself among them; None: all before it
        """
        batch, heads, queries, size = query.shape
        length = key.shape[2]
        block = -(-length // SUB_BLOCK) * SUB_BLOCK  # a sequence is a block
        cells = torch.empty(batch, key.shape[1], block, kv_bytes_per_token_head(size, self.num_bits), dtype=torch.uint8)
        slots = (torch.arange(batch)[:, None] * block + torch.arange(length)).flatten()
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        ranges = self.get_buffer("key_clip_ratio"), self.get_buffer("value_clip_ratio"), self._key_mean
        kernels, scheme = backend("cpu"), KVScheme(self.num_bits, self.rotate_keys)
        kernels.kv_store(rows[1], rows[2], cells, slots, KVCalibration(*ranges), scheme)
        sequences = Sequences(
            query_starts=torch.arange(batch + 1, dtype=torch.int32) * queries,
            seq_lens=torch.full((batch,), length, dtype=torch.int32),
            block_table=torch.arange(batch, dtype=torch.int32)[:, None],
        )
        out = torch.empty(rows[0].shape, dtype=query.dtype)
        kernels.kv_attention(rows[0], cells, sequences, ScoreParams(scale, window), scheme, out)
        return out.view(batch, queries, heads, size)


class DeferredRotary(nn.Module):
    """In place of a model's rotary embedding: an identity, since `cached_attention` turns queries and keys.

    Transformers' own products and the server's differ in last bits, which decide about codes.
    """

    def __init__(self, rotary: nn.Module):
        super().__init__()
        self.rotary = rotary

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of angle 0 for x [batch, tokens, hidden]."""
        cos, sin = self.rotary(x, position_ids)
        return torch.ones_like(cos), torch.zeros_like(sin)

    def turn(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """x [batch, heads, tokens, head_size] at positions start, start + 1, ..., in the dtype of x.

        Each output is x cos + y sin with the second product fused into the sum, as vLLM's kernel
        for CPUs is compiled; float64 holds that product exactly.
        """
        positions = torch.arange(start, start + x.shape[2], device=x.device)[None]
        cos, sin = (t.float()[:, None, :, : x.shape[-1] // 2] for t in self.rotary(x, positions))
        first, second = x.float().chunk(2, -1)
        left = (first * cos).double() - second.double() * sin.double()
        right = (second * cos).double() + first.double() * sin.double()
        return torch.cat((left, right), -1).float().to(x.dtype)


def store_and_load(x: torch.Tensor, num_bits: int, clip: torch.Tensor) -> torch.Tensor:
    """x [..., kv_heads, tokens, head_size] float32 through codes, with scale and zero kept in float16."""
    low = x.amin(-1, keepdim=True).clamp(max=0) * clip[:, :1, None]
    high = x.amax(-1, keepdim=True).clamp(min=0) * clip[:, 1:, None]
    largest = 2**num_bits - 1
    scale = ((high - low) / largest).clamp(SMALLEST_CACHE_SCALE, LARGEST_HALF).half().float()
    zero = low.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
    codes = torch.round((x - zero) / scale).clamp(0, largest)
    return codes * scale + zero


def cached_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface over a quantized cache, `module.attn`: a `SimulatedCache`.

    Queries and keys come without their rotary embedding, which `module.rotary` applies here.

    query [batch, heads, tokens, head_size]; key, value [batch, kv_heads, all tokens, head_size], or those that
    the window can reach; position_ids [1, tokens], None where keys are there from the first on. The sequences of a
    batch are of one length; what the mask says beyond causality and the window is not looked at.
    Transformers' own cache stays exact: the codes of a token are the same whenever they are made.
    """
    cache, rotary = module.attn, module.rotary
    assert isinstance(cache, SimulatedCache)
    assert isinstance(rotary, DeferredRotary)
    end = key.shape[2] if position_ids is None else int(position_ids[0, -1]) + 1
    query, key = rotary.turn(query, end - query.shape[2]), rotary.turn(key, end - key.shape[2])
    return cache.attend(query, key, value, scaling, sliding_window), None
