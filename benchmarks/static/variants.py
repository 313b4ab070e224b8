"""Calls, on the meta device, that launch every variant of the kernels that serving needs, and more."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import cycle, islice, product
from typing import Any

import torch

from benchmarks.static.cases import MODELS
from benchmarks.static.experts import MIXTURES, experts_call
from benchmarks.static.kv_kernels import FULL, Cache, attention_call, store_call
from infoquant_vllm.format import InputTransform, LinearScheme, WeightArgs
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.triton.linear import linear, prepare_linear, prepare_matrices
from offline.presets import PRESETS

Calls = Iterator[Callable[[], Any]]

TOKENS = (1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 2048, 4096, 8192)
FEW, MANY = 7, 40  # on both sides of FEW_TOKENS
EXPERT_TOKENS = (1, 256, 512, 2048)
"""Tokens of a mixture of experts, for each of its tiles."""
OTHER_MIXTURES = (("Qwen3-30B-A3B", "w4a8kv4"), ("Mixtral-8x7B", "fast"))
CONTEXT = 8192
BATCHES = ((FEW, 1), (FULL, 1), (1, FEW))
"""Decoding sequences, and the queries of each: split over programs, not split, and with drafts."""
CHANNELS = 48
GROUPINGS = (
    *((0, 0, 384), (64, 0, 384), (0, 64, 384), (64, 64, 384), (32, 64, 384), (64, 32, 384)),
    *((128, 0, 384), (256, 256, 512), (96, 96, 288)),
)
"""Group sizes of inputs and of weights (0: one group), and features."""
QUANTIZERS = ((4, FEW), (8, MANY), (16, FEW), (4, MANY), (8, FEW), (16, MANY))
"""Bits of the input, and tokens."""
LLAMA = MODELS[0].shape("LlamaForCausalLM", 128_256)
TRANSFORMS = (
    *((InputTransform(type="hadamard", block_size=size), 16 * size) for size in (6, 10, 14)),
    *((InputTransform(type="hadamard", block_size=size), 384) for size in (24, 32, 64, 96, 128, 384)),
    (InputTransform(type="hadamard", block_size=1920), 1920),
    *((InputTransform(type="kronecker", factors=(size, 384 // size)), 384) for size in (2, 6, 12, 96, 192)),
    *((InputTransform(type="kronecker", factors=(size, 4096 // size)), 4096) for size in (8, 64, 512)),
    *((InputTransform(type="blocks", block_size=size), 1920) for size in (16, 32, 64, 192, 960)),
)
"""Input transforms and the features of a row; some factors are smaller than a tensor core's product."""


def serving_calls(presets: Iterable[str] = tuple(PRESETS)) -> Calls:
    """Yield calls of LLaMA-3-8B with up to 8192 tokens (linears, 8-bit lm_head, cache) and of a mixture's experts."""
    model = MODELS[0]
    for name in presets:
        config = PRESETS[name].model_copy(update={"lm_head_bits": 8}).quantization_config(LLAMA)
        assert config.lm_head_scheme is not None
        assert config.kv_cache is not None
        for tokens, (site, (features, channels)) in product(TOKENS, model.linears.items()):
            if site not in config.config_groups:
                continue
            yield linear_call(config.config_groups[site], tokens, features, channels)
        rotated = config.kv_cache.key_transform == "hadamard"
        means, feedback = config.kv_cache.key_mean, config.kv_cache.key_feedback
        layer = Cache(model.heads, model.kv_heads, hadamard=rotated, key_mean=means, key_feedback=feedback)
        for tokens in TOKENS:
            yield linear_call(config.lm_head_scheme, tokens, LLAMA.hidden_size, LLAMA.vocab_size)
            yield store_call(layer, tokens)
            yield attention_call(layer, tokens, 1, CONTEXT)
            yield attention_call(layer, 1, tokens, CONTEXT)
        for sequences, queries in BATCHES:
            yield attention_call(layer, sequences, queries, CONTEXT)
        for tokens in EXPERT_TOKENS if name == "best" else ():
            yield experts_call(MIXTURES["Qwen3-30B-A3B"], name, tokens)


def other_calls() -> Calls:
    """Yield calls of other checkpoints and models: each option with some of the others."""
    yield from product_calls()
    yield from transform_calls()
    for (name, preset), tokens in product(OTHER_MIXTURES, EXPERT_TOKENS):
        yield experts_call(MIXTURES[name], preset, tokens)
    for layer, batch in zip(cache_layers(), cycle(BATCHES), strict=False):
        yield store_call(layer, FEW)
        yield attention_call(layer, *batch, CONTEXT)
        yield attention_call(layer, 1, MANY, CONTEXT)


def product_calls() -> Calls:
    """Yield linears of all bits in all groupings and segments, symmetric or not, of few and of many tokens."""
    given = product(GROUPINGS, (True, False), (FEW, MANY), (4, 8, 16), (4, 8), (1, 3))
    for (inputs, weights, features), symmetric, tokens, input_bits, weight_bits, segments in islice(given, 0, None, 11):
        scheme = linear_scheme(
            weight_bits, input_bits, inputs * (input_bits == 4), weights * (weight_bits == 4), symmetric
        )
        split = segments if input_bits != 16 and features % (segments * 96) == 0 and inputs < 128 else 1
        yield linear_call(scheme, tokens, features, CHANNELS, segments=split)
    for dtype, tokens in product((torch.float16, torch.float32), (FEW, MANY)):
        yield linear_call(linear_scheme(4, 4), tokens, 512, CHANNELS, dtype, bias=True)


def transform_calls() -> Calls:
    """Yield linears with input transforms of all kinds and sizes."""
    for (transform, features), (bits, tokens) in zip(TRANSFORMS, cycle(QUANTIZERS), strict=False):
        yield linear_call(linear_scheme(4, bits, transform=transform), tokens, features, CHANNELS)
    for (transform, features), dtype in zip(TRANSFORMS[::2], cycle((torch.float16, torch.float32)), strict=False):
        yield linear_call(linear_scheme(4, 4, transform=transform), FEW, features, CHANNELS, dtype)
    for (transform, features), tokens in zip(TRANSFORMS[::3], cycle((FEW, MANY)), strict=False):
        yield linear_call(linear_scheme(4, 4, transform=transform, mean=True), tokens, features, CHANNELS)


def cache_layers() -> Iterator[Cache]:
    """Yield heads of all sizes and groups, codes of all bits, windows and soft-caps; few kv-heads compile slowly."""
    for size, bits in zip((32, 64, 80, 96, 128, 192, 256), cycle(product((4, 8), (4, 8))), strict=False):
        yield Cache(16, 8, size, bits)
    yield from (Cache(16, 8, 128, bits) for bits in ((4, 8), (8, 4), (8, 8)))
    yield from (Cache(heads, 2, 64) for heads in (2, 14, 24, 80))
    yield Cache(16, 8, 64, (8, 4), hadamard=False, window=512, block=48)
    yield Cache(16, 8, 128, key_mean=False, soft_cap=50.0)
    yield from (Cache(16, 8, size, bits, key_feedback=True) for size, bits in ((80, (8, 4)), (256, (4, 8))))
    yield Cache(16, 8, 256, window=4096, soft_cap=50.0, dtype=torch.float16)
    yield Cache(16, 8, 64, hadamard=False, key_mean=False, dtype=torch.float32)


def linear_scheme(
    weight_bits: int,
    input_bits: int,
    input_group: int = 0,
    weight_group: int = 0,
    symmetric: bool = True,
    transform: InputTransform | None = None,
    mean: bool = False,
) -> LinearScheme:
    """Return the scheme of a linear; a group of 0 features is all of them."""
    return LinearScheme.model_validate(
        {
            "weights": _grouped("channel", weight_group) | {"num_bits": weight_bits, "symmetric": symmetric},
            "input_activations": _grouped("token", input_group)
            | {"num_bits": input_bits, "symmetric": symmetric, "mean": mean},
            "input_transform": transform or InputTransform(),
        }
    )


def _grouped(whole: str, size: int) -> dict[str, Any]:
    return {"strategy": "group", "group_size": size} if size else {"strategy": whole}


def linear_call(
    scheme: LinearScheme,
    tokens: int,
    features: int,
    channels: int,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    segments: int = 1,
) -> Callable[[], Any]:
    """Return the call of a linear as a vLLM layer makes it."""
    inputs, transform = scheme.input_activations, scheme.input_transform
    hadamard = (transform.block_size or 0) if transform.type == "hadamard" else 0
    matrices = _transform_matrices(transform, features) or _matrices(hadamard)
    groups = segments if inputs.group_size is None else features // inputs.group_size
    clip_ratio = None if inputs.num_bits == 16 else torch.empty(groups, 2, device="meta")
    x = torch.empty(tokens, features, dtype=dtype, device="meta")
    mean = torch.empty(features, device="meta") if inputs.mean else None
    added = torch.float32 if inputs.mean else dtype if bias else None
    given = None if added is None else torch.empty(channels, dtype=added, device="meta")
    quant = InputQuant(matrices, hadamard, clip_ratio, inputs.num_bits, inputs.symmetric, segments, mean)
    weight = prepare_linear(_weight(scheme.weights, channels, features), scheme.weights.num_bits, segments)
    return lambda: linear(x, quant, weight, given)


@cache
def _matrices(hadamard: int) -> list[torch.Tensor]:
    return [matrix.to("meta") for matrix in prepare_matrices([], hadamard)]


def _transform_matrices(transform: InputTransform, features: int) -> list[torch.Tensor]:
    """Return a learned transform's matrices."""
    if transform.type == "blocks":
        size = transform.block_size or features
        return [torch.empty(features // size, size, size, device="meta")]
    return [torch.empty(size, size, device="meta") for size in transform.factors or ()]


def _weight(weights: WeightArgs, channels: int, features: int) -> PackedWeight:
    """Return a checkpoint's tensors of a weight."""
    groups = 1 if weights.group_size is None else features // weights.group_size
    qparams = torch.empty(channels, groups, dtype=torch.uint8, device="meta")
    return PackedWeight(
        torch.empty(channels, features * weights.num_bits // 8, dtype=torch.uint8, device="meta"),
        torch.empty(channels, 1, device="meta"),
        None if weights.group_size is None else qparams,
        None if weights.symmetric else qparams,
    )
