"""All launches of a LLaMA-3-8B decoder layer in one CUDA graph, decoding: W4A4KV4 beside bf16.

Norms, SwiGLU and (for bf16) attention are PyTorch's; RoPE is left out of both.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.attention import Batch, kv4, kv4_cache, sdpa
from benchmarks.gpu.bench import Bench, parser
from benchmarks.gpu.cache_attention import BITS
from benchmarks.gpu.sites import LLAMA_HEADS, SMALL_HEADS, Heads, QuantizedLinear, sites
from benchmarks.gpu.timing import microseconds
from infoquant_vllm.kernels.operands import KVCalibration, KVScheme
from infoquant_vllm.kernels.triton import kv_store

BATCHES = (Batch(1, 1024, 1), Batch(16, 1024, 1), Batch(64, 1024, 1), Batch(64, 8192, 1), Batch(256, 1024, 1))
SMALL_BATCHES = (Batch(2, 40, 1),)
Linear = Callable[[str, torch.Tensor], torch.Tensor]


def main() -> None:
    """Time each batch."""
    bench = Bench.of("layer", parser("layer", __doc__).parse_args())
    for batch in SMALL_BATCHES if bench.dry_run else BATCHES:
        for name, make in (("W4A4KV4", quantized_layer), ("bf16", dense_layer)):

            def measure(batch: Batch = batch, make: Callable[..., Callable[[], Any]] = make) -> dict[str, Any]:
                torch.manual_seed(0)
                return {"us": microseconds([make(batch, bench.dry_run, bench.device)], bench.device)}

            bench.attempt(measure, layer=name, **batch._asdict())


def quantized_layer(batch: Batch, dry_run: bool, device: str) -> Callable[[], Any]:
    """Return a call of our layer."""
    heads = SMALL_HEADS if dry_run else LLAMA_HEADS
    made = {name: QuantizedLinear(site, device) for name, site in sites(dry_run).items()}
    cells, _ = kv4_cache(batch, heads, device)
    slots = torch.arange(batch.sequences, dtype=torch.int64, device=device)
    clip = torch.ones(heads.keys, 2, device=device)
    _, (attend, *_) = kv4(batch, heads, device)

    def attention(qkv: torch.Tensor) -> None:
        key, value = qkv[:, heads.queries :].split(heads.keys, 1)
        calibration, scheme = KVCalibration(clip, clip, None), KVScheme(BITS, hadamard=True)
        kv_store.kv_store(key, value, cells, slots, calibration, scheme)
        attend()

    return _layer(batch, heads, lambda name, x: made[name].calls(x)[0](), attention, dry_run, device)


def dense_layer(batch: Batch, dry_run: bool, device: str) -> Callable[[], Any]:
    """Return a call of the layer in bf16."""
    heads = SMALL_HEADS if dry_run else LLAMA_HEADS
    weights = {
        name: torch.randn(site.channels, site.features, device=device, dtype=torch.bfloat16) / 64
        for name, site in sites(dry_run).items()
    }
    _, (attend, *_) = sdpa(batch, heads, device)
    return _layer(batch, heads, lambda name, x: F.linear(x, weights[name]), lambda qkv: attend(), dry_run, device)


def _layer(
    batch: Batch, heads: Heads, linear: Linear, attention: Callable[[torch.Tensor], Any], dry_run: bool, device: str
) -> Callable[[], Any]:
    hidden = sites(dry_run)["qkv"].features
    norm = torch.ones(hidden, device=device, dtype=torch.bfloat16)
    x = torch.randn(batch.sequences, hidden, device=device, dtype=torch.bfloat16)

    def call() -> torch.Tensor:
        qkv = linear("qkv", F.rms_norm(x, (hidden,), norm, 1e-5))
        attention(qkv.view(batch.sequences, -1, heads.size))
        attended = x + linear("o", qkv[:, :hidden].contiguous())  # what attention gave, to a clock
        gate, up = linear("gate_up", F.rms_norm(attended, (hidden,), norm, 1e-5)).chunk(2, 1)
        return attended + linear("down", F.silu(gate) * up)

    return call


if __name__ == "__main__":
    main()
