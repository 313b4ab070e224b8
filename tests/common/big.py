"""A synthetic checkpoint of LLaMA-3-8B's layer shapes with a small vocabulary, for tests of memory."""

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
"""Of one decoder layer in float32."""


def write_llama_3_8b_layers(folder: Path, layers: int) -> Path:
    """Random weights in bfloat16, a shard per layer; all layers are of the same numbers."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def weight(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) / size[-1] ** 0.5).bfloat16()

    ends = {f"{name}.weight": weight(VOCAB_SIZE, 4096) for name in ("model.embed_tokens", "lm_head")}
    shards = {"ends": ends | {"model.norm.weight": torch.ones(4096).bfloat16()}}
    layer = {f"{name}.weight": weight(*size) for name, size in LAYER.items()}
    layer |= {f"{name}.weight": torch.ones(4096).bfloat16() for name in ("input_layernorm", "post_attention_layernorm")}
    for index in range(layers):
        shards[f"layer-{index}"] = {f"model.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    places = {tensor: f"{name}.safetensors" for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B | {"num_hidden_layers": layers}))
    write_tokenizer(folder)
    return folder
