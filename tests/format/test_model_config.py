"""Every field of a model's config.json is computed alike by transformers and vLLM, or refused by name."""

import ast
import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, LlamaModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from infoquant_vllm.format import ARCHITECTURES, FormatError, ModelShape
from infoquant_vllm.format.architectures import LAYER_TYPES, MULTIPLIERS
from infoquant_vllm.format.model_config import FIELDS
from offline.model.architectures import model_class
from tests.common.checkpoints import hf_config

LLAMA, MISTRAL, MINISTRAL, GRANITE, GEMMA2, GEMMA3, OLMO2, PHI3, QWEN2, QWEN3, SMOLLM3, *_ = ARCHITECTURES
*_, GRANITE_MOE, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE = ARCHITECTURES
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "factor": 2.0}
SOFT_CAPS = "attn_logit_softcapping", "final_logit_softcapping"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
REFUSED: list[tuple[str, dict[str, Any]]] = [
    (LLAMA, {"architectures": ["OtherForCausalLM"]}),
    (LLAMA, {"model_type": "mistral"}),
    (LLAMA, {"model_type": None}),
    (LLAMA, {"vocab_size": 0}),
    (LLAMA, {"hidden_size": 0}),
    (LLAMA, {"intermediate_size": "384"}),
    (LLAMA, {"num_hidden_layers": 0}),
    (LLAMA, {"num_attention_heads": 3}),
    (LLAMA, {"num_key_value_heads": 3}),
    (LLAMA, {"tie_word_embeddings": "yes"}),
    (QWEN2, {"head_dim": 32}),
    (MINISTRAL, {"head_dim": None}),
    (LLAMA, {"hidden_size_per_head": 32}),
    (LLAMA, {"num_kv_heads": 4}),
    (LLAMA, {"n_head_kv": 4}),
    (QWEN3, {"attention_bias": True}),
    (MISTRAL, {"mlp_bias": True}),
    (OLMO2, {"mlp_bias": True}),
    (OLMO2, {"sliding_window": 24}),
    (LLAMA, {"qkv_bias": True}),
    (LLAMA, {"attention_bias": True, "qkv_bias": False}),
    (LLAMA, {"bias": True}),
    (QWEN2, {"qk_norm": True}),
    (LLAMA, {"dtype": "float64"}),
    (LLAMA, {"torch_dtype": "float8_e4m3fn"}),
    (LLAMA, {"compression_config": {"quant_method": "other"}}),
    (LLAMA, {"per_layer_config": {"0": {"intermediate_size": 64}}}),
    (LLAMA, {"block_configs": [{}]}),
    *(
        (name, {architecture.activation[0]: activation})
        for name, architecture in ARCHITECTURES.items()
        for activation in ("gelu", "swish", None)
    ),
    *((LLAMA, {"rms_norm_eps": value}) for value in (0.0, -1.0, None, "1e-5", float("inf"))),
    (LLAMA, {"logit_scale": 0.5}),
    *((GRANITE, {name: value}) for name in MULTIPLIERS for value in (0.0, None, "2")),
    *((GEMMA2, {name: value}) for name in SOFT_CAPS for value in (0.0, -50.0, "50")),
    (GEMMA2, {"tie_word_embeddings": False}),
    (GEMMA2, {"head_dim": None}),
    (GEMMA2, {"sliding_window": None}),
    (GEMMA2, {"use_bidirectional_attention": True}),
    *((GEMMA3, {"query_pre_attn_scalar": value}) for value in (0, None, "256")),
    (GEMMA3, {"head_dim": None}),
    (GEMMA3, {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    (GEMMA3, {"rope_parameters": {"full_attention": LLAMA3}}),
    (GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}),
    (GEMMA3, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    (GEMMA3, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    (GEMMA3, {"rope_local_base_freq": None}),
    (GEMMA3, {"sliding_window": None}),
    (GEMMA3, {"sliding_window_pattern": 0}),
    (GEMMA3, {"layer_types": ["sliding_attention"]}),
    (GEMMA3, {"use_bidirectional_attention": True}),
    (GEMMA3, {"attn_logit_softcapping": 50.0}),
    (GEMMA3, {"final_logit_softcapping": 30.0}),
    (GRANITE, {"attention_sinks": True}),
    (GRANITE, {"layer_types": ["full_attention"] * 2}),
    (GRANITE, {"layer_rope_theta": [10_000.0, 0.0]}),
    (LLAMA, {"final_logit_softcapping": 30.0}),
    (LLAMA, {"attn_logit_softcapping": 50.0}),
    (LLAMA, {"kv_lora_rank": 512}),
    (LLAMA, {"head_dtype": "float32"}),
    (MISTRAL, {"ada_rms_norm_t_cond": True}),
    (LLAMA, {"is_encoder_decoder": True}),
    (LLAMA, {"pad_token_id": 512}),
    (LLAMA, {"max_position_embeddings": 0}),
    (LLAMA, {"original_max_position_embeddings": "256"}),
    (LLAMA, {"rope_theta": None}),
    (LLAMA, {"rope_scaling": "linear"}),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2}}),
    (LLAMA, {"rope_scaling": {"type": "linear"}}),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": None}}),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "dynamic"}}),
    (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}),
    (LLAMA, {"rope_parameters": YARN | {"factor": None}}),
    (LLAMA, {"rope_parameters": YARN | {"beta_fast": None}}),
    (LLAMA, {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    (QWEN2, {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 8, 8]}}),
    (QWEN3, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    (LLAMA, {"rotary_emb_base": 500.0}),
    (LLAMA, {"partial_rotary_factor": 0.5}),
    (PHI3, {"partial_rotary_factor": 1.5}),
    (PHI3, {"partial_rotary_factor": 0.75, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    (PHI3, {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [1.0] * 32}}),
    (PHI3, {"rope_scaling": YARN}),
    (PHI3, {"head_dim": 32}),
    (LLAMA, {"rotary_pct": 0.25}),
    (LLAMA, {"rotary_emb_fraction": 0.5}),
    *((name, {"is_causal": value}) for name in ARCHITECTURES for value in (False, None)),
    (QWEN3, {"layer_types": ["sliding_attention"] * 2}),
    (QWEN2, {"layer_types": ["full_attention"]}),
    (LLAMA, {"target_layer_count": 2}),
    (MISTRAL, {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}),
    (MINISTRAL, {"sliding_window": 24, "layer_types": ["sliding_attention", "chunked_attention"]}),
    (MINISTRAL, {"sliding_window": 0}),
    (QWEN3, {"use_sliding_window": "yes"}),
    (SMOLLM3, {"layer_types": ["sliding_attention"] * 2}),
    (SMOLLM3, {"no_rope_layers": [1]}),
    (SMOLLM3, {"no_rope_layers": [1, 2]}),
    (SMOLLM3, {"no_rope_layer_interval": 0}),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": None}),
    (LLAMA, {"sliding_window": 512}),
    (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 8}}),
    (MISTRAL, {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8192}}),
    (LLAMA, {"attn_implementation": "flash_attention_2"}),
    (LLAMA, {"text_config": {"hidden_size": 512}}),
    (LLAMA, {"text_encoder": {"hidden_size": 512}}),
    (LLAMA, {"decoder": {"hidden_size": 512}}),
    (LLAMA, {"generator": {"hidden_size": 512}}),
    (LLAMA, {"canvas_length": 256}),
    (LLAMA, {"num_local_experts": 8}),
    (LLAMA, {"num_experts": 8}),
    (LLAMA, {"n_routed_experts": 8}),
    (MIXTRAL, {"tie_word_embeddings": True}),
    (MIXTRAL, {"num_local_experts": 0}),
    (MIXTRAL, {"num_experts": 4, "num_local_experts": 8}),
    (MIXTRAL, {"num_local_experts": 8, "num_experts_per_tok": 9}),
    *((GRANITE_MOE, {name: value}) for name in MULTIPLIERS for value in (0.0, None)),
    (GRANITE_MOE, {"attention_sinks": True}),
    (GRANITE_MOE, {"attention_bias": True}),
    (GRANITE_MOE, {"head_dim": 32}),
    (GRANITE_MOE, {"num_local_experts": 0}),
    (OLMOE, {"clip_qkv": 8.0}),
    (OLMOE, {"rms_norm_eps": 1e-6}),
    (OLMOE, {"norm_topk_prob": True}),
    (OLMOE, {"attention_bias": True}),
    (OLMOE, {"tie_word_embeddings": True}),
    (OLMOE, {"head_dim": 32}),
    (QWEN2_MOE, {"qkv_bias": False}),
    (QWEN2_MOE, {"head_dim": 32}),
    (QWEN2_MOE, {"shared_expert_intermediate_size": 0}),
    (QWEN3_MOE, {"num_hidden_layers": 1000, "num_experts": 1000}),
    (QWEN3_MOE, {"moe_intermediate_size": 0}),
    (QWEN3_MOE, {"n_routed_experts": 8}),
    (QWEN3_MOE, {"shared_expert_intermediate_size": 64}),
    (QWEN3_MOE, {"norm_topk_prob": None}),
    (QWEN3_MOE, {"decoder_sparse_step": 2}),
    (QWEN3_MOE, {"mlp_only_layers": [0]}),
]
"""By class; the last field named is the one that is refused."""
UNREAD: dict[str, Any] = {
    "attention_dropout": 0.5,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "initializer_range": 1.0,
    "pretraining_tp": 4,
    "use_cache": False,
    "chunk_size_feed_forward": 0,
    "output_hidden_states": True,
    "return_dict": False,
    "bos_token_id": None,
    "eos_token_id": [2, 3],
    "id2label": {"0": "a"},
    "label2id": {"a": 0},
    "problem_type": "regression",
    "transformers_version": "4.37.0",
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
    "output_router_logits": True,
}


@pytest.mark.parametrize(("architecture", "changes"), REFUSED, ids=str)
def test_field_that_is_not_used_alike_is_refused_by_name(architecture: str, changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=rf"config\.json: .*{list(changes)[-1]}"):
        ModelShape.from_hf({**hf_config(architectures=[architecture]), **changes})


@pytest.mark.parametrize("field", UNREAD)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_field_that_nothing_reads_is_accepted_whatever_it_says(architecture: str, field: str) -> None:
    whole = hf_config(architectures=[architecture])
    assert ModelShape.from_hf(whole | {field: UNREAD[field]}) == ModelShape.from_hf(whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_field_that_nobody_knows_is_accepted(architecture: str) -> None:
    ModelShape.from_hf(hf_config(architectures=[architecture], note="trained on a Tuesday"))


def test_every_field_of_the_table_is_tested() -> None:
    assert FIELDS.keys() == {field for _, changes in REFUSED for field in changes} | UNREAD.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_field_of_the_installed_transformers_is_in_the_table(architecture: str) -> None:
    fields = {field.name for field in dataclasses.fields(model_class(architecture).config_class)}
    assert fields <= FIELDS.keys(), "a field that this release does not know: find out what both make of it"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_that_transformers_writes_is_accepted(architecture: str) -> None:
    kind = model_class(architecture).config_class
    head_dim = kind().hidden_size // kind().num_attention_heads
    config = kind(architectures=[architecture], dtype="bfloat16", pad_token_id=0, head_dim=head_dim).to_dict()
    assert ModelShape.from_hf(config).architecture == architecture


def read_fields(file: Path) -> set[str]:
    """The fields of `config` that a file of vLLM's model classes reads."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and ast.unparse(node.value) in CONFIGS:
            found.add(node.attr)
        called = isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
        if called and ast.unparse(node.args[0]) in CONFIGS and isinstance(node.args[1], ast.Constant):
            found.add(str(node.args[1].value))
    return found


CONFIGS = ("config", "self.config", "hf_config", "text_config", "self.text_config")
METHODS = {"get_text_config"}
WITH_ANOTHER = {"ada_rms_norm_t_cond_dim", "qk_nope_head_dim", "qk_rope_head_dim"}
"""Read only where a field that is refused is set."""


DENSE = "llama", "mistral", "granite", "gemma2", "gemma3", "qwen2", "qwen3"
MODULES = *DENSE, "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"


@pytest.mark.parametrize("module", [*MODULES, "transformers/base", "transformers/causal"])
def test_every_field_that_the_installed_vllm_reads_is_in_the_table(module: str) -> None:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    found = read_fields(Path(spec.origin).parent / f"model_executor/models/{module}.py")
    assert found & {"num_attention_heads", "vocab_size", "num_hidden_layers"}
    assert found - METHODS - WITH_ANOTHER <= FIELDS.keys()


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "theta": {"rope_theta": 500.0},
    "old linear": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0}},
    "old llama3": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
    "yarn": {"rope_parameters": YARN | {"rope_theta": 500.0}},
    "yarn without original": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn options": {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False}},
    "yarn mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}},
    "yarn attention factor": {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "both keys": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
}


LAYER_ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "old": {"rope_theta": 500.0, "rope_local_base_freq": 50.0, "rope_scaling": LINEAR},
    "one of two": {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0}}},
    "two": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 500.0} for kind in LAYER_TYPES}},
}


@pytest.mark.parametrize("kind", LAYER_TYPES)
@pytest.mark.parametrize("rope", LAYER_ROPES)
def test_ropes_of_kinds_of_layers_turn_by_the_same_angles_in_both(rope: str, kind: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.transformers_utils.config import patch_rope_parameters

    whole = hf_config(architectures=[GEMMA3], layer_types=list(LAYER_TYPES), **LAYER_ROPES[rope])
    ModelShape.from_hf(whole)
    config, theirs = (Gemma3TextConfig.from_dict(dict(whole)) for _ in range(2))
    cos, sin = Gemma3RotaryEmbedding(config)(torch.zeros(1), torch.arange(300)[None], kind)
    patch_rope_parameters(theirs)
    with set_current_vllm_config(VllmConfig()):
        table = get_rope(64, 1024, rope_parameters=theirs.rope_parameters[kind], dtype=torch.float32).cos_sin_cache
    torch.testing.assert_close(torch.cat((cos[0, :, :32], sin[0, :, :32]), 1), table[:300], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", ROPES)
def test_ropes_that_are_accepted_turn_by_the_same_angles_in_both(rope: str) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.transformers_utils.config import patch_rope_parameters

    whole = hf_config(**ROPES[rope])
    ModelShape.from_hf(whole)
    config = LlamaConfig.from_dict(dict(whole))
    cos, sin = LlamaModel(LlamaConfig.from_dict(whole | {"num_hidden_layers": 1})).rotary_emb(
        torch.zeros(1), torch.arange(300)[None]
    )
    patch_rope_parameters(config)
    with set_current_vllm_config(VllmConfig()):
        theirs = get_rope(64, 1024, rope_parameters=config.rope_parameters, dtype=torch.float32).cos_sin_cache[:300]
    torch.testing.assert_close(torch.cat((cos[0, :, :32], sin[0, :, :32]), 1), theirs, rtol=1e-4, atol=1e-4)
