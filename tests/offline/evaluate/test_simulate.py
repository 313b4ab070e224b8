"""The simulation computes what the oracles compute, for every scheme the format has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import offline
from infoquant_vllm.format import (
    ActivationArgs,
    InputTransform,
    KVCacheArgs,
    LinearScheme,
    WeightArgs,
    kv_bytes_per_token_head,
    linear_tensors,
)
from infoquant_vllm.kernels.operands import (
    InputQuant,
    KVCalibration,
    KVScheme,
    PackedWeight,
    ScoreParams,
    Sequences,
)
from offline.errors import ToolError
from offline.evaluate.simulate import load_simulated
from offline.evaluate.simulated import SimulatedCache, SimulatedLinear
from offline.model.source import Source
from offline.recipe import Recipe
from tests.common import oracles
from tests.common.checkpoints import write_random
from tests.common.tiny import SIZES, VOCAB_SIZE, write_source

K, N, TOKENS = 192, 40, 23
WEIGHTS = {
    "w4": WeightArgs(num_bits=4),
    "w4-zeros": WeightArgs(num_bits=4, symmetric=False),
    "w4-groups": WeightArgs(num_bits=4, strategy="group", group_size=32),
    "w8": WeightArgs(num_bits=8),
    "w4-zeros-groups": WeightArgs(num_bits=4, symmetric=False, strategy="group", group_size=48),
    "w8-zeros": WeightArgs(num_bits=8, symmetric=False),
}
ACTIVATIONS = {
    "a4": ActivationArgs(num_bits=4),
    "a4-symmetric": ActivationArgs(num_bits=4, symmetric=True),
    "a4-heads": ActivationArgs(num_bits=4, strategy="head", group_size=64),
    "a4-groups": ActivationArgs(num_bits=4, strategy="group", group_size=32, segment_size=96),
    "a4-symmetric-groups": ActivationArgs(num_bits=4, symmetric=True, strategy="group", group_size=16),
    "a4-mean": ActivationArgs(num_bits=4, mean=True),
    "a4-groups-mean": ActivationArgs(num_bits=4, strategy="group", group_size=32, segment_size=96, mean=True),
    "a8-segments": ActivationArgs(num_bits=8, segment_size=64),
    "a8": ActivationArgs(num_bits=8),
    "a16": ActivationArgs(num_bits=16),
}
TRANSFORMS = {
    "none": InputTransform(),
    "hadamard": InputTransform(type="hadamard", block_size=192),
    "hadamard-blocks": InputTransform(type="hadamard", block_size=48),
    "blocks": InputTransform(type="blocks", block_size=64),
    "kronecker": InputTransform(type="kronecker", factors=(12, 16)),
}


def random_tensors(scheme: LinearScheme, generator: torch.Generator) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, spec in linear_tensors(scheme, N, K).items():
        if spec.dtype == "U8":
            low, high = {"weight_multiplier": (1, 9), "weight_zero_point": (0, 2**scheme.weights.num_bits)}.get(
                name, (0, 256)
            )
            tensors[name] = torch.randint(low, high, spec.shape, generator=generator, dtype=torch.uint8)
        elif name == "input_clip_ratio":
            tensors[name] = 0.7 + 0.3 * torch.rand(spec.shape, generator=generator)
        elif name == "weight_scale":
            tensors[name] = 0.1 + torch.rand(spec.shape, generator=generator)
        else:
            tensors[name] = torch.randn(spec.shape, generator=generator)
    return tensors


def expected_output(scheme: LinearScheme, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    transform, args = scheme.input_transform, scheme.input_activations
    matrices = [tensors[name] for name in ("input_blocks", "input_left", "input_right") if name in tensors]
    hadamard = transform.block_size or 0 if transform.type == "hadamard" else 0
    segments = K // (args.segment_size or K)
    quantizer = tensors.get("input_clip_ratio"), args.num_bits, args.symmetric, segments, tensors.get("input_mean")
    inputs = InputQuant(matrices, hadamard, *quantizer)
    qparams = (tensors.get(name) for name in ("weight_multiplier", "weight_zero_point"))
    weight = PackedWeight(tensors["weight_packed"], tensors["weight_scale"], *qparams)
    bias = tensors.get("bias")
    return oracles.linear(
        x, inputs, weight, tensors["output_mean"] + (0 if bias is None else bias) if args.mean else bias
    )


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_simulated_linear_has_the_oracles_bits(weights: str, activations: str, dtype: torch.dtype) -> None:
    scheme = LinearScheme(weights=WEIGHTS[weights], input_activations=ACTIVATIONS[activations])
    generator = torch.Generator().manual_seed(0)
    tensors, x = random_tensors(scheme, generator), torch.randn(TOKENS, K, generator=generator).to(dtype)
    tensors["bias"] = torch.randn(N, generator=generator)
    assert torch.equal(SimulatedLinear(scheme, tensors)(x), expected_output(scheme, tensors, x))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_simulated_linear_has_the_oracles_bits_after_every_transform(transform: str, activations: str) -> None:
    scheme = LinearScheme(
        weights=WEIGHTS["w4"], input_activations=ACTIVATIONS[activations], input_transform=TRANSFORMS[transform]
    )
    generator = torch.Generator().manual_seed(1)
    tensors, x = random_tensors(scheme, generator), torch.randn(TOKENS, K, generator=generator)
    assert torch.equal(SimulatedLinear(scheme, tensors)(x), expected_output(scheme, tensors, x))


SCORE = ScoreParams(0.125)


@pytest.mark.parametrize("num_bits", [(4, 4), (8, 8), (8, 4), (4, 8)])
@pytest.mark.parametrize(("rotate", "soft_cap"), [(True, None), (False, None), (True, 2.0)])
def test_simulated_attention_has_the_oracles_bits(
    num_bits: tuple[int, int], rotate: bool, soft_cap: float | None
) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, 5, 64, generator=generator)
    key, value = torch.randn(2, 2, 2, TOKENS, 64, generator=generator)
    clips = 0.7 + 0.3 * torch.rand(2, 2, 2, generator=generator)
    offset = torch.randn(2, 64, generator=generator)
    args = KVCacheArgs(
        key_bits=num_bits[0], value_bits=num_bits[1], key_transform="hadamard" if rotate else "none", key_mean=True
    )
    tensors = {"key_clip_ratio": clips[0], "value_clip_ratio": clips[1], "key_mean": offset}
    score = SCORE._replace(soft_cap=soft_cap)
    found = SimulatedCache(args, tensors).attend(query, key, value, score)
    for i in range(2):
        cells = torch.zeros(1, 2, 32, kv_bytes_per_token_head(64, num_bits), dtype=torch.uint8)
        rows = key[i].transpose(0, 1), value[i].transpose(0, 1)
        scheme = KVScheme(num_bits, rotate)
        oracles.kv_store(*rows, cells, torch.arange(TOKENS), KVCalibration(*clips, offset), scheme)
        expected = _attention(query[i].transpose(0, 1), cells, scheme, score)
        assert torch.equal(found[i], expected)


def _attention(query: torch.Tensor, cells: torch.Tensor, scheme: KVScheme, score: ScoreParams = SCORE) -> torch.Tensor:
    """Attend from the last tokens [tokens, heads, head_size] of a sequence in block 0, by the oracle."""
    starts, lens, table = (torch.tensor(x, dtype=torch.int32) for x in ([0, len(query)], [TOKENS], [[0]]))
    out = torch.empty_like(query)
    oracles.kv_attention(query, cells, Sequences(starts, lens, table), score, scheme, out)
    return out


def test_attention_of_a_model_is_the_oracles(tmp_path: Path) -> None:
    model = load_simulated(write_random(tmp_path / "checkpoint"), torch.float32)
    attention = model.model.layers[0].self_attn
    recorded: list[torch.Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda _, args: recorded.append(args[0]))
    rows: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        attention.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: rows.update({name: out[0]}))
    tokens = torch.randint(3, 500, (1, TOKENS), generator=torch.Generator().manual_seed(4))
    model(tokens)
    query, key = rows["q_proj"].view(TOKENS, 4, 64), rows["k_proj"].view(TOKENS, 2, 64)
    cos, sin = model.model.rotary_emb.rotary(query, torch.arange(TOKENS)[None])
    query, key = apply_rotary_pos_emb(query, key, cos[0], sin[0])
    cells = torch.zeros(1, 2, 32, 72, dtype=torch.uint8)
    cache, value = attention.attn, rows["v_proj"].view(TOKENS, 2, 64)
    calibration, scheme = KVCalibration(cache.key_clip_ratio, cache.value_clip_ratio, None), KVScheme((4, 4), True)
    oracles.kv_store(key, value, cells, torch.arange(TOKENS), calibration, scheme)
    expected = _attention(query, cells, scheme)
    found = recorded[0][0].view(TOKENS, 4, 64)
    assert (found - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_eight_bit_checkpoint_computes_nearly_what_its_source_computes(
    tmp_path: Path, size: str, transform: str
) -> None:
    source = write_source(tmp_path / "source", **SIZES[size])
    site: dict[str, Any] = {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}, "clip_ratio": 1.0}
    recipe = Recipe.model_validate(
        {
            "name": "eight",
            "transform": transform,
            "rounding": "rtn",
            "sites": dict.fromkeys(("qkv", "o", "gate_up", "down"), site),
            "kv_cache": {"key_bits": 8, "value_bits": 8, "key_clip_ratio": 1.0, "value_clip_ratio": 1.0},
        }
    )
    offline.quantize(source, tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(5))
    expected = Source.open(source).model(torch.float32)(tokens).logits
    found = load_simulated(tmp_path / "out", torch.float32)(tokens).logits
    assert (found - expected).norm() / expected.norm() < 0.15  # a rotation left out anywhere gives more than 1


def test_token_does_not_depend_on_those_after_it_or_beside_it(tmp_path: Path) -> None:
    model = load_simulated(write_random(tmp_path / "checkpoint", tie_word_embeddings=True), torch.float32)
    tokens = torch.randint(3, 500, (3, 40), generator=torch.Generator().manual_seed(6))
    together, alone = model(tokens).logits[1, :17], model(tokens[1:2, :17]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


WINDOW = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5}


@pytest.mark.parametrize("changes", [{}, WINDOW], ids=["all tokens", "a window"])
def test_decoding_with_transformers_cache_equals_one_pass(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = load_simulated(write_random(tmp_path / "checkpoint", **changes), torch.float32)
    tokens = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(7))
    first = model(tokens[:, :8], use_cache=True)
    rest = model(tokens[:, 8:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, model(tokens).logits[:, 8:], rtol=1e-3, atol=1e-3)


def test_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "checkpoint")
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ToolError, match="the shard is missing"):
        load_simulated(folder)
