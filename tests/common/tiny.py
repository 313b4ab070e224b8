"""Tiny random models in source folders, with a tokenizer, and LoRA adapters of them, for tests without training."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infoquant_vllm.format import ARCHITECTURES, FUSED, SITES
from offline.model.architectures import CausalLM, model_class
from offline.model.source import Source

RANK, PREFIX = 4, "base_model.model."
LINEARS = tuple(linear for linears in SITES.values() for linear in linears)
SPECIAL = ("<unk>", "<s>", "</s>")
VOCAB_SIZE = 272  # 256 bytes, the special tokens, and a few rows that no token uses
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

SIZES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "untied-biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "no-gqa": {"num_key_value_heads": 4},
    "one-kv-head": {"num_key_value_heads": 1, "head_dim": 32},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"architecture": "MistralForCausalLM", "tie_word_embeddings": False, "sliding_window": 512},
    "mistral-window": {"architecture": "MistralForCausalLM", "tie_word_embeddings": False, "sliding_window": 24},
    "ministral": {
        "architecture": "MinistralForCausalLM",
        "tie_word_embeddings": False,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {
        "architecture": "GraniteForCausalLM",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.02,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "phi3": {
        "architecture": "Phi3ForCausalLM",
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.75,
        "pad_token_id": 0,
    },
    "qwen2": {
        "architecture": "Qwen2ForCausalLM",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen3": {"architecture": "Qwen3ForCausalLM", "head_dim": 128},
    "qwen3-windows": {
        "architecture": "Qwen3ForCausalLM",
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "smollm3": {
        "architecture": "SmolLM3ForCausalLM",
        "no_rope_layers": [0, 1],
        "use_sliding_window": True,
        "sliding_window": 24,
        "pad_token_id": 0,
    },
    "gemma2": {
        "architecture": "Gemma2ForCausalLM",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 200,
        "sliding_window": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "pad_token_id": 0,
    },
    "gemma3": {
        "architecture": "Gemma3ForCausalLM",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 200,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
        },
        "pad_token_id": 0,
    },
    "olmo2": {"architecture": "Olmo2ForCausalLM", "tie_word_embeddings": False, "pad_token_id": 0},
    "mixtral": {"architecture": "MixtralForCausalLM", "tie_word_embeddings": False, "num_local_experts": 4},
    "granite-moe": {
        "architecture": "GraniteMoeForCausalLM",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.02,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
        "pad_token_id": 0,
    },
    "olmoe": {
        "architecture": "OlmoeForCausalLM",
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "pad_token_id": 0,
    },
    "qwen2-moe": {
        "architecture": "Qwen2MoeForCausalLM",
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 160,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "qwen3-moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "odd": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 1376},
}
"""Configurations that tests run over: what differs from the default one."""
MIXTURES = ("mixtral", "granite-moe", "olmoe", "qwen2-moe", "qwen3-moe")
FAMILIES = (
    *("llama3-rope", "mistral", "mistral-window"),
    *("ministral", "granite", "phi3", "qwen2", "qwen3", "qwen3-windows", "smollm3", "gemma2", "gemma3", "olmo2"),
    *MIXTURES,
)
"""Those that differ in more than sizes."""


def write_source(
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    architecture: str = "LlamaForCausalLM",
    **config: Any,
) -> Path:
    """Write a random model and its tokenizer to `folder`, and return it. `config` overrides the config's fields."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    kind = model_class(architecture)
    model = kind(kind.config_class(**(sizes | config)))
    _randomize(model, torch.Generator().manual_seed(seed), ARCHITECTURES[architecture].norm_offset)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder


def write_adapter(
    folder: Path, source: Path, seed: int = 0, linears: Sequence[str] = LINEARS, strength: float = 0.5, **config: Any
) -> Path:
    """Write a LoRA adapter as PEFT does, of some linears of every layer; `config` overrides fields of its config."""
    shape, generator = Source.open(source).shape, torch.Generator().manual_seed(seed)
    sizes = dict(shape.layer_linears)
    if ARCHITECTURES[shape.architecture].fused:
        for fused, parts in FUSED.items():
            sizes[fused] = sum(sizes[part][0] for part in parts), sizes[parts[0]][1]
            linears = [fused if linear == parts[0] else linear for linear in linears if linear not in parts[1:]]
    tensors = {}
    for layer in range(shape.num_hidden_layers):
        for linear in linears:
            (n, k), place = sizes[linear], f"{PREFIX}model.layers.{layer}.{linear}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, k, generator=generator) / k**0.5
            tensors[f"{place}.lora_B.weight"] = torch.randn(n, RANK, generator=generator) * strength
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({linear.rpartition(".")[2] for linear in linears}),
        "bias": "none",
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merge(source: Path, adapter: Path, folder: Path, scale: float = 2.0) -> Path:
    """Write the source with `scale` B A of an adapter added to its weights."""
    shutil.copytree(source, folder)
    file, added = folder / "model.safetensors", load_file(adapter / "adapter_model.safetensors")
    tensors = load_file(file)
    for name, a in added.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            tensors[f"{module.removeprefix(PREFIX)}.weight"] += scale * added[f"{module}.lora_B.weight"] @ a
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> None:
    """One that knows bytes."""
    _tokenizer().save_pretrained(folder)


@torch.no_grad()
def _randomize(model: CausalLM, generator: torch.Generator, norm_offset: int) -> None:
    """Weights with a few large columns, norm gains and biases away from what a fresh model has."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 - norm_offset + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        else:
            outliers = 1 + 4 * (torch.rand(parameter.shape[-1], generator=generator) < 0.02)
            parameter.copy_(noise * outliers / parameter.shape[-1] ** 0.5)
    model.tie_weights()


def _tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
