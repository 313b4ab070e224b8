"""`quantization_config` is refused by field and value where it breaks the format."""

from typing import Any

import pytest

from infoquant_vllm.format import (
    ARCHITECTURES,
    FormatError,
    ModelShape,
    activation_segments,
    expected_tensors,
    linear_tensors,
    parse_config,
)
from tests.common.checkpoints import hf_config, quantization_config


def config(**changes: Any) -> dict[str, Any]:
    return quantization_config(hf_config(), **changes)


def group(**changes: Any) -> dict[str, Any]:
    scheme = {"targets": ["q_proj"], "weights": {"num_bits": 4}, "input_activations": {"num_bits": 4}}
    return {"config_groups": {"g": scheme | changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "format_version is 1, this release reads 3"),
        ({"format_version": None}, "format_version is None"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq', expected 'infoquant'"),
        ({"surprise": 1}, "surprise"),
        (group(weights={"num_bits": 3}), "config_groups.g.weights.num_bits.*found 3"),
        (group(weights={"num_bits": 4, "scale": 2}), "config_groups.g.weights.scale"),
        (group(weights={"num_bits": 4, "strategy": "group"}), "group_size None does not go with strategy 'group'"),
        (group(input_activations={"num_bits": 4, "group_size": 64}), "group_size 64 does not go with strategy 'token'"),
        (group(weights={"num_bits": 8, "strategy": "group", "group_size": 64}), "'group' needs num_bits 4, found 8"),
        (
            group(input_activations={"num_bits": 8, "strategy": "head", "group_size": 64}),
            "strategy 'head' needs num_bits 4, found 8",
        ),
        (
            group(input_activations={"num_bits": 4, "strategy": "group", "group_size": 64, "segment_size": 96}),
            "group_size 64 does not divide segment_size 96",
        ),
        (
            group(input_activations={"num_bits": 16, "segment_size": 96}),
            "segment_size 96 does not go with num_bits 16",
        ),
        (group(input_transform={"type": "fourier"}), "input_transform.type.*found 'fourier'"),
        (group(input_transform={"type": "hadamard"}), "block_size None does not go with type 'hadamard'"),
        (group(input_transform={"type": "kronecker", "factors": [2, 2**40]}), "factors"),
        (group(targets=[]), "targets"),
        ({"ignore": ["q_proj"]}, "q_proj is named by more than one group, or by a group and ignore"),
        ({"kv_cache": {"key_bits": 4, "value_bits": 2}}, "kv_cache.value_bits.*found 2"),
        ({"lm_head_bits": 4, "ignore": []}, "lm_head_bits.*found 4"),
        ({"lm_head_bits": 8}, "lm_head_bits 8 quantizes lm_head, which ignore or a group names"),
    ],
)
def test_wrong_field_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_config(config(**changes), "config.json")


def test_longest_ending_of_a_name_decides() -> None:
    four = group()["config_groups"]["g"]
    eight = group(targets=["model.layers.1.self_attn.q_proj"], weights={"num_bits": 8})["config_groups"]["g"]
    parsed = parse_config(config(config_groups={"all": four, "one": eight}))
    bits = []
    for layer in (0, 1):
        scheme = parsed.scheme(f"model.layers.{layer}.self_attn.q_proj")
        assert scheme is not None
        bits.append(scheme.weights.num_bits)
    assert bits == [4, 8]


@pytest.mark.parametrize(("tied", "module"), [(True, "model.embed_tokens"), (False, "lm_head")])
def test_8_bit_vocabulary_is_the_matrix_that_makes_the_logits(tied: bool, module: str) -> None:
    shape = ModelShape.from_hf(hf_config(tie_word_embeddings=tied))
    plain, eight = (expected_tensors(parse_config(config(**c)), shape) for c in ({}, {"lm_head_bits": 8, "ignore": []}))
    gone, new = plain.keys() - eight.keys(), eight.keys() - plain.keys()
    assert gone == {f"{module}.weight"}
    assert new == {f"{module}.weight_packed", f"{module}.weight_scale"}
    assert (eight[f"{module}.weight_packed"].shape, eight[f"{module}.weight_packed"].dtype) == ((512, 256), "U8")
    assert (eight[f"{module}.weight_scale"].shape, eight[f"{module}.weight_scale"].dtype) == ((512, 1), "F32")


def test_groups_have_multipliers_of_one_scale_per_row_and_means_a_number_per_feature() -> None:
    weights = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 64}
    inputs = {"num_bits": 4, "strategy": "group", "group_size": 32, "segment_size": 128, "mean": True}
    scheme = parse_config(config(**group(weights=weights, input_activations=inputs))).scheme("q_proj")
    assert scheme is not None
    tensors = linear_tensors(scheme, 96, 256)
    found = {name: (spec.shape, spec.dtype) for name, spec in tensors.items() if name != "weight_packed"}
    assert found == {
        "weight_scale": ((96, 1), "F32"),
        "weight_multiplier": ((96, 4), "U8"),
        "weight_zero_point": ((96, 4), "U8"),
        "input_clip_ratio": ((8, 2), "F32"),
        "input_mean": ((256,), "F32"),
        "output_mean": ((96,), "F32"),
    }
    assert activation_segments(scheme.input_activations, 256) == 2


def test_linear_that_nothing_names_is_refused() -> None:
    with pytest.raises(FormatError, match="k_proj: no target of config_groups names it"):
        expected_tensors(parse_config(config(**group())), ModelShape.from_hf(hf_config()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    ],
)
def test_wrong_model_size_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        ModelShape.from_hf(hf_config(**changes))


def test_sizes_that_do_not_divide_are_refused_with_the_linear() -> None:
    wrong = config(config_groups={"all": group(targets=["q_proj"], weights={
        "num_bits": 4, "strategy": "group", "group_size": 100})["config_groups"]["g"]})  # fmt: skip
    with pytest.raises(FormatError, match=r"q_proj: weight group_size 100 does not divide its 256 input features"):
        expected_tensors(parse_config(wrong), ModelShape.from_hf(hf_config()))


MISTRAL, QWEN2, QWEN3 = "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (
            "PhimoeForCausalLM",
            {"num_local_experts": 16},
            r"architectures is \['PhimoeForCausalLM'\], a mixture of 16 experts; this release knows Llama",
        ),
        ("DeepseekV3ForCausalLM", {"n_routed_experts": 256}, "DeepseekV3ForCausalLM.*a mixture of 256 experts"),
        ("GPT2LMHeadModel", {}, r"architectures is \['GPT2LMHeadModel'\]; this release knows"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window is 0, expected a number of tokens .* Mistral"),
        (
            MISTRAL,
            {"sliding_window": 512, "layer_types": ["full_attention"] * 2},
            "sliding_window 512 is below max_position_embeddings 1024",
        ),
        (MISTRAL, {"sliding_window": None, "attention_bias": True}, "attention_bias is True"),
        ("LlamaForCausalLM", {"sliding_window": 512}, "sliding_window 512"),
        (QWEN2, {"use_sliding_window": 1}, "use_sliding_window is 1.* with Qwen2ForCausalLM"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types.*sliding_attention"),
        (QWEN2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic', not default, linear"),
        (QWEN3, {"rope_parameters": ["yarn"]}, r"rope_parameters is \['yarn'\], not an object"),
        (QWEN2, {"head_dim": 32}, "head_dim 32 is not hidden_size / num_attention_heads"),
        (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        (QWEN3, {"attention_bias": True}, "attention_bias is True.* with Qwen3ForCausalLM"),
    ],
)
def test_model_that_is_not_served_is_refused_by_name(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        ModelShape.from_hf(hf_config(architectures=[architecture], **changes))


@pytest.mark.parametrize("architectures", [None, "LlamaForCausalLM", [], [["LlamaForCausalLM"]], [QWEN2, QWEN3]])
def test_architectures_that_are_no_one_name_are_refused(architectures: object) -> None:
    with pytest.raises(FormatError, match="architectures is"):
        ModelShape.from_hf(hf_config(architectures=architectures))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        (MISTRAL, {"sliding_window": None}),
        (MISTRAL, {"sliding_window": 1024}),
        (MISTRAL, {"sliding_window": 512}),
        (QWEN3, {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}),
        (MISTRAL, {"max_position_embeddings": 32768}),
        (QWEN2, {"use_sliding_window": False, "sliding_window": 512, "max_window_layers": 1}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1}),
        (QWEN3, {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}),
        (QWEN3, {"layer_types": ["full_attention"] * 2}),
    ],
)
def test_variant_that_is_served_is_accepted(architecture: str, changes: dict[str, Any]) -> None:
    assert ModelShape.from_hf(hf_config(architectures=[architecture], **changes)).architecture == architecture


def test_sizes_that_a_config_leaves_out_are_those_of_its_class() -> None:
    silent = {name: value for name, value in hf_config(num_attention_heads=64).items() if name != "head_dim"}
    del silent["num_key_value_heads"]
    found = {}
    for name in ("LlamaForCausalLM", MISTRAL, QWEN2, QWEN3):
        known = {"architectures": [name], "model_type": ARCHITECTURES[name].model_type}
        shape = ModelShape.from_hf(silent | known)
        found[name] = shape.num_key_value_heads, shape.head_dim
    assert found == {"LlamaForCausalLM": (64, 4), MISTRAL: (8, 4), QWEN2: (32, 4), QWEN3: (32, 128)}


KEY_MEAN = {"key_bits": 4, "value_bits": 4, "key_mean": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head_bits": 8}, "lm_head_bits is 8, but vLLM quantizes no tied embedding of Gemma2ForCausalLM"),
        ({"online_r1": True}, "online_r1 is true, but vLLM quantizes no tied embedding of Gemma2ForCausalLM"),
        ({"kv_cache": KEY_MEAN}, r"key_mean is true, but attn_logit_softcapping 50\.0 bounds the scores"),
    ],
)
def test_checkpoint_that_its_class_cannot_serve_is_refused(changes: dict[str, Any], message: str) -> None:
    hf = hf_config(architectures=["Gemma2ForCausalLM"])
    data = quantization_config(hf, **{"online_r1": False, "ignore": []} | changes)
    with pytest.raises(FormatError, match=message):
        expected_tensors(parse_config(data), ModelShape.from_hf(hf))


def test_a_mean_key_goes_with_scores_without_a_soft_cap() -> None:
    hf = hf_config(architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=None, final_logit_softcapping=None)
    data = quantization_config(hf, kv_cache=KEY_MEAN, online_r1=False)
    tensors = expected_tensors(parse_config(data), ModelShape.from_hf(hf))
    assert "model.layers.0.self_attn.attn.key_mean" in tensors


def test_tensors_are_those_of_the_class() -> None:
    def small(architecture: str) -> set[str]:
        shape = ModelShape.from_hf(hf_config(architectures=[architecture], num_hidden_layers=1))
        tensors = expected_tensors(parse_config(config()), shape)
        return {name.removeprefix("model.layers.0.self_attn.") for name in tensors}

    plain = small("LlamaForCausalLM")
    assert small(MISTRAL) == plain
    assert small(QWEN2) - plain == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert small(QWEN3) - plain == {"q_norm.weight", "k_norm.weight"}
