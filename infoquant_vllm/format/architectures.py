"""The model classes whose checkpoints the format describes, and where they differ from Llama's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """What a class of transformers and vLLM makes of config.json; the defaults are what Llama needs least.

    model_type: what config.json calls the class's config
    bias_fields: those of `attention_bias` and `mlp_bias` that add biases to all linears of their part
    qkv_bias: q, k and v carry a bias whatever the config says, o none
    qk_norm: RMSNorms over each head of queries and of keys before RoPE, `q_norm` and `k_norm` [head_dim]
    windows: `sliding_window` is that of every layer
    free_head_dim: `head_dim` may be another than hidden_size / num_attention_heads
    defaults: what a field stands for where config.json does not name it
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
"""By the name in config.json; `model_config` says which uses of their fields are served.

A class that is added takes a line here and one in `offline/model/architectures.py`.
"""
