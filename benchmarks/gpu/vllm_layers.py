"""The linears of a decoder layer on this GPU, each as vLLM serves it: W4A4 (ours), FP8, W4A16 and vLLM's W4A4.

Layers are vLLM's own, of random weights, so that vLLM chooses the kernel; quantizing the input is in the time. A row
is a format, a site and a number of tokens, with the microseconds of a call in a CUDA graph.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import get_quantization_config

from benchmarks.gpu.bench import Bench, parser
from benchmarks.gpu.sites import MODULES, sizes
from benchmarks.gpu.timing import copies, microseconds
from benchmarks.speed.baselines import FLOAT8, FORMATS
from infoquant_vllm import register
from infoquant_vllm.format import ModelShape
from offline import PRESETS

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
TOKENS = (1, 16, 64, 256, 2048)
SMALL_TOKENS = (2,)


def main() -> None:
    """Time each format's layers."""
    bench = Bench.of("vllm_layers", parser("vllm_layers", __doc__).parse_args())
    config = SMALL if bench.dry_run else LLAMA
    with one_worker(bench.device):
        for name in formats(config):
            for site in MODULES:
                measure(bench, name, site, config)


@contextmanager
def one_worker(device: str) -> Iterator[None]:
    """Set up what vLLM's layers ask of their surroundings: a single rank."""
    register()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        backend = "gloo" if device == "cpu" else "nccl"
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend)
        initialize_model_parallel(1)
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()


def formats(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a `quantization_config` by name; ours is that of the preset `fast`."""
    fast = PRESETS["fast"].quantization_config(ModelShape.from_hf(config, "benchmarks.gpu.vllm_layers"))
    return {
        "W4A4 (fast)": fast.model_dump(mode="json"),
        "FP8": FLOAT8,
        "W4A16": FORMATS["w4a16"][1],
        "vLLM's W4A4": FORMATS["w4a4"][1],
    }


def measure(bench: Bench, name: str, site: str, config: dict[str, Any]) -> None:
    """Write a row for each number of tokens; one row where vLLM does not serve the format here."""
    shape, layers = ModelShape.from_hf(config, "benchmarks.gpu.vllm_layers"), []

    def prepare() -> dict[str, Any]:
        given = site, *sizes(shape, site), formats(config)[name], bench.device
        layers.append(make(*given))
        number = copies(sum(parameter.nbytes for parameter in layers[0].parameters()), bench.device)
        layers.extend(make(*given) for _ in range(number - 1))
        return {"kernel": _kernel(layers[0])}

    bench.attempt(prepare, format=name, site=site)
    for tokens in (SMALL_TOKENS if bench.dry_run else TOKENS) if layers else ():
        x = torch.randn(tokens, layers[0].input_size, device=bench.device, dtype=torch.bfloat16)
        calls = [partial(layer, x) for layer in layers]
        bench.attempt(partial(_time, calls, bench.device), format=name, site=site, tokens=tokens)


def _time(calls: Sequence[Callable[[], Any]], device: str) -> dict[str, float | None]:
    return {"us": microseconds(calls, device)}


def make(site: str, features: int, channels: int, settings: dict[str, Any], device: str) -> ReplicatedLinear:
    """Make a layer of random weights, ready to serve; raise what vLLM raises where it does not serve it."""
    torch.manual_seed(0)
    config = get_quantization_config(settings["quant_method"]).from_config(settings)
    prefix = f"model.layers.0.{MODULES[site]}"
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
    """Return the kernel that vLLM chose, as far as its layer shows."""
    scheme = getattr(layer, "scheme", None)
    found = getattr(scheme, "kernel", None) or getattr(scheme, "fp8_linear", None) or scheme or layer.quant_method
    return type(found).__name__


def _random(param: torch.Tensor) -> torch.Tensor:
    """Fill tensors: random codes, small positive scales and clip ratios."""
    if not param.is_floating_point():
        limits = torch.iinfo(param.dtype)
        return torch.randint(limits.min, limits.max, param.shape, dtype=param.dtype)
    return (torch.rand(param.shape) / 100 + 0.01).to(param.dtype)


if __name__ == "__main__":
    main()
