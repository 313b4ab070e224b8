"""Attention of a LLaMA-3-8B layer on this GPU: over the 4-bit cache, beside PyTorch's and vLLM's over bf16.

A row is a batch (sequences, tokens of context, queries of each) and a kernel, with the microseconds of a call in a CUDA
graph: decoding batches, of one query each or of a few (speculative), with GB/s of the cache read, prompts with TFLOP/s.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.gpu.bench import Bench, parser
from benchmarks.gpu.cache_attention import BITS, BLOCK, FEW_QUERIES, Sequences, attention
from benchmarks.gpu.sites import LLAMA_HEADS, SMALL_HEADS, Heads
from benchmarks.gpu.timing import copies, microseconds
from infoquant_vllm.format import kv_bytes_per_token_head

FA3_BLOCK = 16
LONGEST = 16_384
"""`--max-model-len` of the engine that these batches would be of."""


class Batch(NamedTuple):
    """`sequences` of `context` tokens, of which the last `queries` ask."""

    sequences: int
    context: int
    queries: int

    @property
    def decodes(self) -> bool:
        """Return whether reading the cache bounds it."""
        return self.queries <= FEW_QUERIES


BATCHES = (
    *(Batch(sequences, context, 1) for sequences, context in ((1, 1024), (16, 1024), (64, 1024), (256, 1024))),
    *(Batch(sequences, context, 1) for sequences, context in ((1, 16384), (16, 16384), (64, 8192), (256, 128))),
    *(Batch(sequences, context, 4) for sequences, context in ((1, 8192), (16, 1024), (64, 8192))),
    *(Batch(*sizes) for sizes in ((1, 2048, 2048), (1, 8192, 8192), (1, 16384, 2048), (8, 1024, 1024))),
)
SMALL_BATCHES = (Batch(2, 40, 1), Batch(1, 40, 4), Batch(1, 40, 40))


def main() -> None:
    """Time each batch."""
    bench = Bench.of("attention", parser("attention", __doc__).parse_args())
    heads, batches = (SMALL_HEADS, SMALL_BATCHES) if bench.dry_run else (LLAMA_HEADS, BATCHES)
    for batch in batches:
        for kernel, make in KERNELS.items():
            if kernel != "KV4" and bench.dry_run:
                continue
            facts = {"kernel": kernel, **batch._asdict()}
            bench.attempt(partial(measure, batch, heads, make, bench.device), **facts)


def measure(
    batch: Batch, heads: Heads, make: Callable[..., tuple[int, list[Callable[[], Any]]]], device: str
) -> dict[str, Any]:
    """Return microseconds, and what they come to."""
    torch.manual_seed(0)
    cache_bytes, calls = make(batch, heads, device)
    us = microseconds(calls, device, repeat=8 if batch.decodes else 3)
    if us is None:
        return {"us": us}
    if batch.decodes:
        return {"us": us, "gb_per_s": cache_bytes / us / 1e3}
    seen = batch.queries * batch.context - batch.queries * (batch.queries - 1) / 2
    return {"us": us, "tflops": 4.0 * batch.sequences * heads.queries * heads.size * seen / us / 1e6}


def kv4_cache(batch: Batch, heads: Heads, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pages of random codes under valid scales, and a block table that scatters them."""
    used = -(-batch.context // BLOCK)
    pages = batch.sequences * used
    cells = torch.randint(
        0, 256, (pages, heads.keys, BLOCK, kv_bytes_per_token_head(heads.size, BITS)), dtype=torch.uint8, device=device
    )
    numbers = torch.rand(pages, heads.keys, 4 * BLOCK, device=device).half() / 8 + 0.01
    cells.view(pages, heads.keys, -1)[..., -8 * BLOCK :] = numbers.view(torch.uint8)  # scales and zeros come last
    return cells, torch.randperm(pages, device=device).int().view(batch.sequences, used)


def kv4(batch: Batch, heads: Heads, device: str) -> tuple[int, list[Callable[[], Any]]]:
    """Return bytes of the cache and calls of our kernel."""
    tokens = batch.sequences * batch.queries
    query = torch.randn(tokens, heads.queries, heads.size, device=device, dtype=torch.bfloat16)
    first, table = kv4_cache(batch, heads, device)
    caches = [first, *(kv4_cache(batch, heads, device)[0] for _ in range(copies(first.nbytes, device) - 1))]
    sequences = Sequences.of(batch.queries, batch.context, table)
    attend = attention(query, heads.keys, sequences, torch.empty_like(query), LONGEST)
    return first.nbytes, [partial(attend, cells) for cells in caches]


def sdpa(batch: Batch, heads: Heads, device: str) -> tuple[int, list[Callable[[], Any]]]:
    """Return the same of PyTorch's attention over bf16, where its mask fits: one query, or all that there are."""
    if batch.queries not in (1, batch.context):
        raise ValueError("PyTorch's causal mask has no chunk of a prompt")
    query = torch.randn(batch.sequences, heads.queries, batch.queries, heads.size, device=device, dtype=torch.bfloat16)
    sizes = batch.sequences, heads.keys, batch.context, heads.size
    key = torch.randn(2, *sizes, device=device, dtype=torch.bfloat16)
    pairs = [key, *(torch.randn_like(key) for _ in range(copies(key.nbytes, device) - 1))]
    attend = partial(F.scaled_dot_product_attention, is_causal=batch.queries > 1, enable_gqa=True)
    return key.nbytes, [partial(attend, query, *pair) for pair in pairs]


def flash_attention_3(batch: Batch, heads: Heads, device: str) -> tuple[int, list[Callable[[], Any]]]:
    """Return the same of vLLM's FlashAttention 3 over its paged bf16 cache."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    pages = batch.sequences * -(-batch.context // FA3_BLOCK)
    query = torch.randn(batch.sequences * batch.queries, heads.queries, heads.size, device=device, dtype=torch.bfloat16)
    sizes = 2, pages, FA3_BLOCK, heads.keys, heads.size
    cache = torch.randn(sizes, device=device, dtype=torch.bfloat16)
    caches = [cache, *(torch.randn_like(cache) for _ in range(copies(cache.nbytes, device) - 1))]
    options = {
        "max_seqlen_q": batch.queries,
        "cu_seqlens_q": torch.arange(batch.sequences + 1, dtype=torch.int32, device=device) * batch.queries,
        "max_seqlen_k": batch.context,
        "seqused_k": torch.full((batch.sequences,), batch.context, dtype=torch.int32, device=device),
        "block_table": torch.randperm(pages, device=device).int().view(batch.sequences, -1),
        "softmax_scale": heads.size**-0.5,
        "causal": True,
        "fa_version": 3,
    }
    return cache.nbytes, [partial(flash_attn_varlen_func, query, *pair, **options) for pair in caches]


KERNELS: dict[str, Callable[..., tuple[int, list[Callable[[], Any]]]]] = {
    "KV4": kv4,
    "PyTorch, bf16": sdpa,
    "FlashAttention 3, bf16": flash_attention_3,
}

if __name__ == "__main__":
    main()
