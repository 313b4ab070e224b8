"""A real language model as a mixture of experts: a dense one whose MLP is copied into every expert.

Sparse upcycling (Komatsuzaki et al., 2023, arXiv 2212.05055): weights of Mixtral's router sum to 1, so that equal
experts compute what the MLP does, whatever the router says.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROUTER_SPREAD = 0.1
"""Standard deviation of the router's scores over those of the normalized inputs."""
LINEARS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def first_layers(model: Path, folder: Path, count: int) -> Path:
    """Write a model of the first decoder layers of another: it takes less time, and its activations are real ones."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    later = tuple(f"model.layers.{layer}." for layer in range(count, config["num_hidden_layers"]))
    tensors = {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(later)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    return folder


def upcycle(dense: Path, folder: Path, experts: int = 4, chosen: int = 2, noise: float = 0.0) -> Path:
    """Write a Mixtral made of a Llama with tied embeddings; the experts' weights differ by `noise`, relative."""
    generator = torch.Generator().manual_seed(0)
    config: dict[str, Any] = json.loads((dense / "config.json").read_text())
    tensors = {name: tensor for file in sorted(dense.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    dtype = tensors["model.norm.weight"].dtype
    found = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    found["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe"
        scale = ROUTER_SPREAD * config["hidden_size"] ** -0.5
        router = scale * torch.randn(experts, config["hidden_size"], generator=generator)
        found[f"{block}.gate.weight"] = router.to(dtype)
        for expert in range(experts):
            for name, linear in LINEARS.items():
                weight = tensors[f"model.layers.{layer}.mlp.{linear}.weight"].float()
                other = noise * weight.std() * torch.randn(weight.shape, generator=generator)
                found[f"{block}.experts.{expert}.{name}.weight"] = (weight + other).to(dtype)
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    mixture = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": chosen,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config | mixture))
    return folder
