"""config.json of models that people serve, for tests of sizes; without weights."""

from typing import Any

REAL: dict[str, tuple[float, dict[str, Any]]] = {
    "Phi-4": (
        14.66e9,
        {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "attention_bias": False,
            "bos_token_id": 100257,
            "eos_token_id": 100265,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "intermediate_size": 17920,
            "max_position_embeddings": 16384,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 10,
            "original_max_position_embeddings": 16384,
            "pad_token_id": 100349,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 250_000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 100352,
        },
    ),
}
"""By name: number of parameters, config.json."""
