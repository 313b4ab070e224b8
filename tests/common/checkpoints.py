"""Small random checkpoints in the real format, for tests of what serves them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from infoquant_vllm.format import (
    ARCHITECTURES,
    FORMAT_VERSION,
    INDEX_FILE,
    ModelShape,
    TensorSpec,
    expected_tensors,
    parse_config,
)

DTYPES = {"U8": torch.uint8, "F32": torch.float32, None: torch.bfloat16}


def hf_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny Llama: 2 layers, 4 query heads on 2 kv-heads of 64."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    named = changes.get("architectures", config["architectures"])
    found = next((known for name, known in ARCHITECTURES.items() if named == [name]), None)
    config["model_type"] = "unknown" if found is None else found.model_type
    config["tie_word_embeddings"] = found is not None and found.tied == "always"
    return config | changes


def quantization_config(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """W4A4KV4 with per-head o_proj inputs and a Hadamard on the down_proj input."""
    known = ARCHITECTURES.get(config["architectures"][0])
    weights, experts = {"num_bits": 4}, None if known is None else known.experts
    gate, up, down = (
        ("gate_proj", "up_proj", "down_proj") if experts is None else (experts.gate, experts.up, experts.down)
    )
    data = {
        "quant_method": "infoquant",
        "format_version": FORMAT_VERSION,
        "config_groups": {
            "residual": {
                "targets": ["q_proj", "k_proj", "v_proj", gate, up],
                "weights": weights,
                "input_activations": {"num_bits": 4},
            },
            "out": {
                "targets": ["o_proj"],
                "weights": weights,
                "input_activations": {"num_bits": 4, "strategy": "head", "group_size": config["head_dim"]},
            },
            "down": {
                "targets": [down],
                "weights": weights,
                "input_activations": {"num_bits": 4},
                "input_transform": {
                    "type": "hadamard",
                    "block_size": config["intermediate_size" if experts is None else experts.size],
                },
            },
        },
        "ignore": ["lm_head", *(() if experts is None else experts.gates)],
        "kv_cache": {"key_bits": 4, "value_bits": 4, "key_transform": "hadamard"},
        "online_r1": config["tie_word_embeddings"] and (known is None or not known.plain_embedding),
    }
    return data | changes


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor the config promises: random codes, and scales that keep activations of order 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = ModelShape.from_hf(config)
    expected = expected_tensors(parse_config(config["quantization_config"]), shape)
    tensors = {name: _random(name, spec, generator) for name, spec in sorted(expected.items())}
    first = {
        f"model.layers.{layer}.{linear}": f"model.layers.{layer}.{linears[0]}"
        for layer in range(shape.num_hidden_layers)
        for linears in shape.shared_inputs
        for linear in linears
    }
    for module, (_, in_features) in shape.linears().items():
        for name in (
            f"{module}.input_clip_ratio",
            f"{module}.input_mean",
            f"{module}.input_blocks",
            f"{module}.input_left",
            f"{module}.input_right",
        ):
            if name in tensors:  # linears that vLLM fuses share their input
                tensors[name] = tensors[first[module] + name.removeprefix(module)].clone()
        if f"{module}.weight_scale" in tensors:
            multiplier = 6 if f"{module}.weight_multiplier" in tensors else 1
            tensors[f"{module}.weight_scale"] *= 0.2 / multiplier / in_features**0.5
    if f"{shape.lm_head_module}.weight_scale" in tensors:
        tensors[f"{shape.lm_head_module}.weight_scale"] /= 74.0  # the standard deviation of 8-bit codes
    return tensors


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A folder with config.json, one shard and its index."""
    folder.mkdir(parents=True, exist_ok=True)
    shard = "model-00001-of-00001.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}))
    return folder


def write_random(folder: Path, quantization: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A whole random checkpoint; `quantization` changes quantization_config, the rest config.json."""
    config = hf_config(**changes)
    config["quantization_config"] = quantization_config(config, **(quantization or {}))
    return write_checkpoint(folder, config, random_tensors(config))


def _random(name: str, spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    kind, shape = name.rsplit(".", 1)[-1], spec.shape
    if kind == "weight_multiplier":
        return torch.randint(4, 9, shape, generator=generator, dtype=torch.uint8)  # 8 goes with all zero-points
    if kind in ("weight_packed", "weight_zero_point"):
        high = 16 if kind == "weight_zero_point" else 256
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)
    if kind.endswith("clip_ratio"):
        return 0.8 + 0.2 * torch.rand(shape, generator=generator)
    if kind == "weight_scale":
        return 0.5 + torch.rand(shape, generator=generator)
    if kind in ("r1", "input_blocks", "input_left", "input_right"):
        return torch.linalg.qr(torch.randn(shape, generator=generator))[0].contiguous()
    if "norm" in name:
        return torch.ones(shape, dtype=DTYPES[spec.dtype])
    return torch.randn(shape, generator=generator).to(DTYPES[spec.dtype])
