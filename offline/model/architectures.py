"""How each model class is read, folded, rotated and balanced: one table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from infoquant_vllm.format import ModelShape
from offline.errors import ToolError

CausalLM = LlamaForCausalLM | MistralForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Rules:
    """One model class; module names are those inside a decoder layer.

    config, model: the classes of transformers
    readers: the linears behind each norm, which its gain and the residual rotation fold into
    writers: the linears that add to the residual stream
    queries, keys: the last modules before RoPE that scale single features of queries and of keys; norms
        over the head are such, and undo whatever the linears before them scale
    """

    config: type[PreTrainedConfig]
    model: type[CausalLM]
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: READERS)
    writers: tuple[str, ...] = WRITERS
    queries: str = "self_attn.q_proj"
    keys: str = "self_attn.k_proj"


RULES: dict[str, Rules] = {
    "LlamaForCausalLM": Rules(LlamaConfig, LlamaForCausalLM),
    "MistralForCausalLM": Rules(MistralConfig, MistralForCausalLM),
    "Qwen2ForCausalLM": Rules(Qwen2Config, Qwen2ForCausalLM),
    "Qwen3ForCausalLM": Rules(Qwen3Config, Qwen3ForCausalLM, queries="self_attn.q_norm", keys="self_attn.k_norm"),
}
"""By the name in config.json; `ARCHITECTURES` of the format has a line for each, for the tensors that it holds."""


def rules_for(shape: ModelShape) -> Rules:
    """The rules of a model's class."""
    return RULES[shape.architecture]


def read_config(shape: ModelShape, hf_config: Mapping[str, Any], file: Path) -> PreTrainedConfig:
    """The config of transformers' class from what `file` holds; raises ToolError where transformers refuses it."""
    try:
        return rules_for(shape).config.from_dict(dict(hf_config))
    except Exception as error:  # huggingface_hub has its own validation errors, not derived from ValueError
        raise ToolError(f"{file}: transformers refuses it ({error})") from None


def empty_model(shape: ModelShape, config: PreTrainedConfig) -> CausalLM:
    """The model without any values (device meta), apart from its rotary embedding, which nothing stores."""
    with torch.device("meta"):
        model = rules_for(shape).model(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model
