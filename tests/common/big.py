"""LLaMA-3-8B's config with a small vocabulary, and a model of half its sizes, for tests of memory."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from infoquant_vllm.format import INDEX_FILE
from tests.common.tiny import VOCAB_SIZE, write_tokenizer

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
LAYER_BYTES = 4 * sum(rows * columns for rows, columns in LAYER.values())
"""Bytes of one decoder layer in float32."""
HALF = LLAMA_3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
HALF_LAYER = {name: (rows // 2, columns // 2) for name, (rows, columns) in LAYER.items()}
"""Half of every size: a layer has a quarter of the bytes, and GPTQ takes an eighth of the time."""


def write_half_size_model(folder: Path) -> Path:
    """Write a model of one layer with random bfloat16 weights, in a shard per layer."""
    folder.mkdir()
    generator, hidden = torch.Generator().manual_seed(0), 2048

    def weight(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5).bfloat16()

    ends = {f"{name}.weight": weight(VOCAB_SIZE, hidden) for name in ("model.embed_tokens", "lm_head")}
    layer = {f"{name}.weight": weight(*size) for name, size in HALF_LAYER.items()}
    layer |= {
        f"{name}.weight": torch.ones(hidden).bfloat16() for name in ("input_layernorm", "post_attention_layernorm")
    }
    shards = {
        "ends": ends | {"model.norm.weight": torch.ones(hidden).bfloat16()},
        "layer-0": {f"model.layers.0.{name}": tensor for name, tensor in layer.items()},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    places = {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(HALF | {"num_hidden_layers": 1}))
    write_tokenizer(folder)
    return folder
