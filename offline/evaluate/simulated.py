"""Modules that compute what the server computes, from a checkpoint's tensors: in torch, bit for bit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from infoquant_vllm.format import (
    KVCacheArgs,
    LinearScheme,
    activation_segments,
    apply_hadamard,
    kv_bytes_per_token_head,
)
from infoquant_vllm.kernels.dispatch import backend
from infoquant_vllm.kernels.operands import InputQuant, KVCalibration, KVScheme, PackedWeight, ScoreParams, Sequences
from infoquant_vllm.kernels.torch.elementwise import apply_rope, rms_norm
from infoquant_vllm.kernels.torch.kv_cache import SUB_BLOCK
from infoquant_vllm.kernels.torch.linear import linear, prepare_linear
from offline.algorithms.fake_quantize import added_to_product
from offline.algorithms.rotations import transform_operands

QPARAMS = ("weight_multiplier", "weight_zero_point")


class SimulatedLinear(nn.Module):
    """A quantized linear: input transform, activation codes, exact integer product, scales."""

    def __init__(self, scheme: LinearScheme, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.scheme = scheme
        prepared = prepare_linear(_packed_weight(tensors), scheme.weights.num_bits, 1)
        for name, tensor in (tensors | {"weight_packed": prepared.packed}).items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., K] by the weight; return [..., N] in the dtype of x."""
        tensors, args = dict(self.named_buffers()), self.scheme.input_activations
        transform = transform_operands(self.scheme.input_transform, tensors)
        segments = activation_segments(args, x.shape[-1])
        inputs = InputQuant(
            *transform,
            tensors.get("input_clip_ratio"),
            args.num_bits,
            args.symmetric,
            segments,
            tensors.get("input_mean"),
        )
        out = linear(x.flatten(0, -2), inputs, _packed_weight(tensors), added_to_product(tensors))
        return out.unflatten(0, x.shape[:-1])


def _packed_weight(tensors: dict[str, torch.Tensor]) -> PackedWeight:
    return PackedWeight(tensors["weight_packed"], tensors["weight_scale"], *(tensors.get(name) for name in QPARAMS))


class SimulatedNorm(nn.Module):
    """RMSNorm, rounded as the server rounds it."""

    def __init__(self, weight: nn.Parameter, epsilon: float, offset: int):
        super().__init__()
        gain = weight if offset == 0 else nn.Parameter(weight.float() + offset, requires_grad=False)
        self.weight, self.epsilon = gain, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x [..., hidden]; keep its shape and dtype."""
        return rms_norm(x, self.weight, self.epsilon)


class SimulatedActivation(nn.Module):
    """The activation of a gate, rounded as the server rounds it."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it to x [...]; keep its shape and dtype."""
        return self.activation(x)


class SimulatedRouter(nn.Module):
    """The router of a mixture, with the roundings of vLLM on CPUs, in place of one of transformers."""

    def __init__(self, router: Any):
        super().__init__()
        self.weight, self.top_k = router.weight, router.top_k
        self.normalized = getattr(router, "norm_topk_prob", True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return scores [tokens, experts], and weights float32 and indices of the chosen experts [tokens, top_k]."""
        scores = functional.linear(x, self.weight)
        highest, chosen = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        if self.normalized:
            return scores, torch.softmax(highest, dim=-1).float(), chosen
        return scores, (highest - torch.logsumexp(scores, dim=-1, keepdim=True)).exp().float(), chosen


class RotatedEmbedding(nn.Module):
    """A tied embedding whose rows are rotated by R1, by the server's kernel."""

    def __init__(self, weight: nn.Parameter, rotation: torch.Tensor):
        super().__init__()
        self.weight = weight
        self.register_buffer("rotation", rotation)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids [...]; return rows [..., hidden] in the model's dtype."""
        return _rotate_rows(functional.embedding(ids, self.weight), self.get_buffer("rotation"), None)


class RotatedHead(nn.Module):
    """A tied lm_head: undo R1, apply the folded weight of the final norm, multiply by the embedding."""

    def __init__(self, product: nn.Module, rotation: torch.Tensor, final_norm: torch.Tensor):
        super().__init__()
        self.product = product
        self.register_buffer("back", rotation.T.contiguous())
        self.register_buffer("final_norm", final_norm)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits [..., vocab] from hidden [..., H], in its dtype."""
        return self.product(_rotate_rows(hidden, self.get_buffer("back"), self.get_buffer("final_norm")))


def _rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    return backend("cpu").rotate_rows(rows.flatten(0, -2), rotation, gain).view(rows.shape)


class SimulatedCache(nn.Module):
    """The KV cache of one layer, from its tensors in the checkpoint."""

    def __init__(self, args: KVCacheArgs, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.num_bits, self.rotate_keys = args.num_bits, args.key_transform == "hadamard"
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Apply R3, if the cache has it, to keys or queries [..., head_size]; return float32."""
        return apply_hadamard(x.float()) if self.rotate_keys else x.float()

    def prepare_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """Subtract the mean key from keys [..., kv_heads, tokens, head_size] and apply R3, as before quantization."""
        return self.rotate(keys if self._key_mean is None else keys.float() - self._key_mean[:, None])

    @property
    def _key_mean(self) -> torch.Tensor | None:
        return dict(self.named_buffers()).get("key_mean")

    @property
    def feedback(self) -> torch.Tensor | None:
        """Return the feedback of the errors of keys, if there is one."""
        return dict(self.named_buffers()).get("key_feedback")

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: ScoreParams) -> torch.Tensor:
        """Compute causal attention by the server's kernels; return [batch, tokens, heads, head_size] as query's dtype.

        query [batch, heads, tokens, head_size]; key, value [batch, kv_heads, all tokens, head_size]
        """
        batch, heads, queries, size = query.shape
        length = key.shape[2]
        block = -(-length // SUB_BLOCK) * SUB_BLOCK  # one block holds a sequence
        shape = (batch, key.shape[1], block, kv_bytes_per_token_head(size, self.num_bits))
        cache = torch.empty(shape, dtype=torch.uint8)
        slots = (torch.arange(batch)[:, None] * block + torch.arange(length)).flatten()
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        clips = self.get_buffer("key_clip_ratio"), self.get_buffer("value_clip_ratio")
        kernels, scheme = backend("cpu"), KVScheme(self.num_bits, self.rotate_keys)
        kernels.kv_store(rows[1], rows[2], cache, slots, KVCalibration(*clips, self._key_mean, self.feedback), scheme)
        sequences = Sequences(
            query_starts=torch.arange(batch + 1, dtype=torch.int32) * queries,
            seq_lens=torch.full((batch,), length, dtype=torch.int32),
            block_table=torch.arange(batch, dtype=torch.int32)[:, None],
        )
        out = torch.empty(rows[0].shape, dtype=query.dtype)
        kernels.kv_attention(rows[0], cache, sequences, score, scheme, out)
        return out.view(batch, queries, heads, size)


class DeferredRotary(nn.Module):
    """An identity in place of a model's rotary embedding: `cached_attention` applies RoPE to queries and keys.

    Transformers' own products and the server's differ in last bits, which decide about codes.

    arguments: of the rotary embedding beside positions, for the layer whose RoPE is applied
    """

    def __init__(self, rotary: nn.Module, arguments: tuple[str, ...] = ()):
        super().__init__()
        self.rotary, self.arguments = rotary, arguments

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines of angle 0 for x [batch, tokens, hidden]."""
        cos, sin = self.rotary(x, position_ids, *args)
        return torch.ones_like(cos), torch.zeros_like(sin)

    def apply_rope(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Rotate x [batch, heads, tokens, head_size] at positions start, start + 1, ...; keep its dtype."""
        positions = torch.arange(start, start + x.shape[2], device=x.device)[None]
        cos, sin = (t.float()[:, None].chunk(2, -1)[0] for t in self.rotary(x, positions, *self.arguments))
        return apply_rope(x, cos, sin)


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
    """Attend over the quantized cache `module.attn`, a `SimulatedCache`; implements transformers' interface.

    Queries and keys come without RoPE, which `module.rotary` applies here, unless the layer has none.

    query [batch, heads, tokens, head_size]; key, value [batch, kv_heads, all tokens, head_size], or those that
    the window can reach; position_ids [1, tokens], None if the keys start at position 0. All sequences of a batch
    have one length; the mask is ignored beyond causality and the window. Transformers' own cache stays
    unquantized: a token has the same codes whenever it is quantized.
    """
    cache, rotary = module.attn, module.rotary
    assert isinstance(cache, SimulatedCache)
    assert isinstance(rotary, DeferredRotary)
    end = key.shape[2] if position_ids is None else int(position_ids[0, -1]) + 1
    if getattr(module, "use_rope", True):
        query, key = rotary.apply_rope(query, end - query.shape[2]), rotary.apply_rope(key, end - key.shape[2])
    return cache.attend(query, key, value, ScoreParams(scaling, sliding_window, kwargs.get("softcap"))), None
