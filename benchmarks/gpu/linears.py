"""The linears of a decoder layer on this GPU, each as vLLM serves it: bf16, ours, FP8, W4A16 and vLLM's W4A4.

Layers are vLLM's own, of random weights, so that vLLM chooses the kernel; quantising the input is in the time. A row
is a format and a number of tokens, with microseconds by site; a format that vLLM does not serve here has the reason
instead. On a CPU (--device cpu) layers run once and nothing is timed.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import get_quantization_config

from benchmarks.gpu.kernels import device_provenance
from benchmarks.peers import FLOAT8, FORMATS
from benchmarks.provenance import write_rows
from infoquant_vllm import register
from infoquant_vllm.format import ModelShape
from offline import PRESETS

SITES = MappingProxyType(
    {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_proj", "down": "mlp.down_proj"}
)
"""A linear of each site's scheme, under whose name all of the site is made."""
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
SMALL = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"head_dim": 64}
TOKENS = (1, 16, 256, 2048)


def main() -> None:
    """Measure, print rows and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.linears", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    with one_worker(options.device):
        config = SMALL if options.device == "cpu" else LLAMA
        rows = [row for name in formats(config) for row in measure(name, config, options.device)]
    for row in rows:
        Console().print(row)
    if options.json:
        write_rows(rows, options.json)


@contextmanager
def one_worker(device: str) -> Iterator[None]:
    """What vLLM's layers and parameters ask about their surroundings: a single worker."""
    register()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        backend = "gloo" if device == "cpu" else "nccl"
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend)
        initialize_model_parallel(1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def formats(config: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
    """A `quantization_config` by name; ours is that of the preset `fast`."""
    fast = PRESETS["fast"].quantization_config(ModelShape.from_hf(config, "benchmarks.gpu.linears"))
    return {
        "bf16": None,
        "W4A4 (fast)": fast.model_dump(mode="json"),
        "FP8": FLOAT8,
        "W4A16": FORMATS["w4a16"][1],
        "vLLM's W4A4": FORMATS["w4a4"][1],
    }


def measure(name: str, config: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """A row for each number of tokens."""
    shape = ModelShape.from_hf(config, "benchmarks.gpu.linears")
    row, settings = {"format": name, "hidden_size": shape.hidden_size, **device_provenance()}, formats(config)[name]
    try:
        layers = {site: make(site, *sizes(shape, site), settings, device) for site in SITES}
        row |= {"kernel": _kernel(layers["down"])}
        return [row | {"tokens": tokens, "sites_us": _times(layers, tokens, device)} for tokens in TOKENS]
    except Exception as error:  # whatever vLLM says of a format that this machine does not serve
        return [row | {"problem": f"{type(error).__name__}: {error}"}]


def sizes(shape: ModelShape, site: str) -> tuple[int, int]:
    """(features, channels) of all that a site's linears make together."""
    linears = shape.linears()
    parts = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(site, (site,))
    found = [size for name, size in linears.items() if name.startswith("model.layers.0.")
             and name.split(".")[-1].removesuffix("_proj") in parts]  # fmt: skip
    return found[0][1], sum(channels for channels, _ in found)


def make(site: str, features: int, channels: int, settings: dict[str, Any] | None, device: str) -> ReplicatedLinear:
    """A layer of random weights, ready to serve; raises what vLLM raises where it does not serve it."""
    torch.manual_seed(0)
    config = None
    if settings is not None:
        config = get_quantization_config(settings["quant_method"]).from_config(settings)
    prefix = f"model.layers.0.{SITES[site]}"
    with torch.device(device):
        layer = ReplicatedLinear(
            features, channels, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix=prefix
        )
        for name, param in layer.named_parameters():
            loaded = torch.tensor([channels, features]) if name == "weight_shape" else _random(param)
            load: Any = getattr(param, "weight_loader")  # noqa: B009 (which torch's parameters do not know of)
            load(param, loaded)
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def _kernel(layer: ReplicatedLinear) -> str:
    """What vLLM chose, as far as its layer tells."""
    scheme = getattr(layer, "scheme", None)
    found = getattr(scheme, "kernel", None) or getattr(scheme, "fp8_linear", None) or scheme or layer.quant_method
    return type(found).__name__


def _random(param: torch.Tensor) -> torch.Tensor:
    """Codes are any, scales and clips small and positive."""
    if not param.is_floating_point():
        limits = torch.iinfo(param.dtype)
        return torch.randint(limits.min, limits.max, param.shape, dtype=param.dtype)
    return (torch.rand(param.shape) / 100 + 0.01).to(param.dtype)


def _times(layers: dict[str, ReplicatedLinear], tokens: int, device: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for site, layer in layers.items():
        x = torch.randn(tokens, layer.input_size, device=device, dtype=torch.bfloat16)
        layer(x)
        if device != "cpu":
            from triton.testing import do_bench

            found[site] = 1e3 * do_bench(lambda layer=layer, x=x: layer(x), return_mode="median")
    return found


if __name__ == "__main__":
    main()
