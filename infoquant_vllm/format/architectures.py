"""List the model classes that the format covers, and how each differs from Llama."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Describe how transformers and vLLM read config.json for one model class.

    model_type: `model_type` of the class's config
    bias_fields: the fields among `attention_bias` and `mlp_bias` that add biases to all linears of their block
    qkv_bias: q, k and v always have a bias, o never has one
    qk_norm: queries and keys pass through RMSNorms per head before RoPE, `q_norm` and `k_norm` [head_dim]
    windows: `sliding_window` applies to every layer
    free_head_dim: `head_dim` may differ from hidden_size / num_attention_heads
    defaults: values of fields that config.json leaves out
    """

    model_type: str
    bias_fields: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: bool = False
    free_head_dim: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", bias_fields=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Architecture(
        "mistral",
        windows=True,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072},
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2",
        qkv_bias=True,
        free_head_dim=False,
        defaults={"num_key_value_heads": 32, "use_sliding_window": False},
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", qk_norm=True, defaults={"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False}
    ),
}
"""Architectures by their name in config.json; `model_config` checks the values of their fields.

A new class needs one entry here and one in `offline/model/architectures.py`.
"""
