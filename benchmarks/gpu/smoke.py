"""A launch of each Triton kernel on this GPU in a small shape, held against the CPU's reference.

A row is a kernel in a shape with its error, and whether it is within what the kernel promises. The first row is the
device. Exits with 1 where a kernel is wrong or did not run.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, parser
from benchmarks.gpu.cache_attention import BITS, BLOCK, FEW_QUERIES, Sequences, attention
from benchmarks.gpu.mixtures import Mixture, prepared
from benchmarks.gpu.sites import moved
from infoquant_vllm.format import kv_bytes_per_token_head
from infoquant_vllm.kernels import operands
from infoquant_vllm.kernels.operands import (
    ExpertChoice,
    InputQuant,
    KVCalibration,
    KVScheme,
    PackedWeight,
    ScoreParams,
)
from infoquant_vllm.kernels.torch import experts as torch_experts
from infoquant_vllm.kernels.torch import kv_cache as expected
from infoquant_vllm.kernels.torch import linear as torch_linear
from infoquant_vllm.kernels.triton import experts as triton_experts
from infoquant_vllm.kernels.triton import kv_store
from infoquant_vllm.kernels.triton import linear as triton_linear

TOLERANCE = 0.01  # of the greatest output: outputs are bf16


@dataclass(frozen=True)
class Case:
    """`sequences` of `context` tokens, of which the last `queries` ask."""

    heads: int
    kv_heads: int
    size: int
    sequences: int
    context: int
    queries: int

    @property
    def kernel(self) -> str:
        """Return the kernel that serves it."""
        return "kv_decode" if self.queries <= FEW_QUERIES else "kv_attention"


@dataclass(frozen=True)
class Product:
    """A W4A4 linear whose input and weight are quantized in so many groups, through a Hadamard or (0) none."""

    tokens: int
    features: int
    channels: int
    groups: int
    weight_groups: int
    hadamard: int


@dataclass(frozen=True)
class Experts:
    """W4A4 experts of a mixture."""

    tokens: int
    mixture: Mixture


CASES = (Case(4, 2, 64, 2, 40, 1), Case(4, 2, 64, 1, 300, 4), Case(4, 2, 64, 2, 40, 12))
PRODUCTS = (Product(5, 128, 48, 2, 2, 0), Product(40, 192, 32, 1, 1, 192))
MIXTURES = (Experts(7, Mixture(128, 96, 4, 2, 32)),)
GPU_CASES = (
    *(Case(32, 8, 128, 2, 1200, queries) for queries in (1, 4)),  # contexts in parts
    Case(32, 32, 64, 36, 200, 1),  # enough sequences for one program to go through the parts of each
    Case(32, 8, 128, 2, 300, 70),
)
GPU_PRODUCTS = (
    Product(5, 4096, 512, 128, 64, 0),
    Product(300, 4096, 512, 128, 64, 4096),
    Product(80, 2048, 256, 1, 1, 2048),
)
GPU_MIXTURES = (
    *(Experts(tokens, Mixture(2048, 768, 16, 4)) for tokens in (1, 300)),
    Experts(80, Mixture(2048, 768, 16, 4, 64)),
)


def main() -> None:
    """Check every kernel."""
    bench = Bench.of("smoke", parser("smoke", __doc__).parse_args())
    right: list[bool] = []

    def checked(check: Callable[[Any, str], dict[str, Any]], case: Any) -> dict[str, Any]:
        found = check(case, bench.device)
        right.append(found["right"])
        return found

    bench.attempt(lambda: device_facts(bench.device), what="device")
    cases, products = (CASES, PRODUCTS) if bench.dry_run else (GPU_CASES, GPU_PRODUCTS)
    mixtures = MIXTURES if bench.dry_run else GPU_MIXTURES
    checks: list[tuple[str, Any, Any]] = [
        ("kv_store", check_store, cases[0]),
        *((case.kernel, check_attention, case) for case in cases),
        *(("linear", check_linear, case) for case in products),
        *(("experts", check_experts, case) for case in mixtures),
    ]
    for kernel, check, case in checks:
        bench.attempt(partial(checked, check, case), kernel=kernel, **asdict(case))
    sys.exit(0 if len(right) == len(checks) and all(right) else 1)


def device_facts(device: str) -> dict[str, Any]:
    """Return what the GPU says of itself."""
    if device == "cpu":
        return {}
    found = torch.cuda.get_device_properties(0)
    names = ("name", "multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin")
    return {"capability": f"{found.major}.{found.minor}"} | {name: getattr(found, name, None) for name in names}


SCHEME = KVScheme(BITS, hadamard=True)


class Cache:
    """Random keys and values of a case, and an empty cache with a block table that scatters its pages."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.key, self.value = torch.randn(2, case.sequences * case.context, case.kv_heads, case.size).bfloat16()
        used = -(-case.context // BLOCK)
        self.table = torch.randperm(case.sequences * used).int().view(case.sequences, used)
        places = torch.arange(case.context)
        self.slots = (self.table[:, places // BLOCK].long() * BLOCK + places % BLOCK).flatten()
        pages = self.table.numel(), case.kv_heads, BLOCK
        self.cells = torch.zeros(*pages, kv_bytes_per_token_head(case.size, BITS), dtype=torch.uint8)
        self.clip = torch.ones(case.kv_heads, 2)

    def store_arguments(self) -> list[Any]:
        """Return arguments of `kv_store`."""
        return [self.key, self.value, self.cells, self.slots, KVCalibration(self.clip, self.clip, None), SCHEME]


def check_store(case: Case, device: str) -> dict[str, Any]:
    """Hold the bytes that `kv_store` writes against the reference's."""
    store = Cache(case).store_arguments()
    there = _on(device, store)
    expected.kv_store(*store)
    kv_store.kv_store(*there)
    wrong = (there[2].cpu() != store[2]).float().mean().item()
    return {"error": wrong, "right": wrong == 0}


def check_attention(case: Case, device: str) -> dict[str, Any]:
    """Hold the kernel of the case against the reference, over a cache that the reference stored."""
    cache = Cache(case)
    expected.kv_store(*cache.store_arguments())
    query = torch.randn(case.sequences * case.queries, case.heads, case.size).bfloat16()
    right, found = torch.empty_like(query), torch.empty_like(query, device=device)
    batch = Sequences.of(case.queries, case.context, cache.table)
    sequences = operands.Sequences(batch.starts, batch.lens, batch.table)
    expected.kv_attention(query, cache.cells, sequences, ScoreParams(case.size**-0.5), SCHEME, right)
    there = Sequences.of(case.queries, case.context, cache.table.to(device))
    attention(query.to(device), case.kv_heads, there, found, case.context)(cache.cells.to(device))
    return _compared(found.cpu(), right)


def check_linear(case: Product, device: str) -> dict[str, Any]:
    """Hold a linear, its quantizer and its product, against the reference."""
    torch.manual_seed(0)
    x, clip = torch.randn(case.tokens, case.features).bfloat16(), torch.full((case.groups, 2), 0.9)
    packed = torch.randint(0, 256, (case.channels, case.features // 2), dtype=torch.uint8)
    multiplier, zero = torch.randint(1, 9, (2, case.channels, case.weight_groups), dtype=torch.uint8)
    grouped = case.weight_groups > 1
    given = PackedWeight(packed, torch.rand(case.channels, 1), *((multiplier, zero) if grouped else (None, None)))
    inputs = InputQuant([], case.hadamard, clip, 4, symmetric=False)
    matrices = [matrix.to(device) for matrix in triton_linear.prepare_matrices([], case.hadamard)]
    prepared = inputs._replace(matrices=matrices, clip_ratio=clip.to(device))
    there = moved(triton_linear.prepare_linear(given, 4, 1), device)
    found = triton_linear.linear(x.to(device), prepared, there, None)
    plain = torch_linear.prepare_linear(given, 4, 1)
    return _compared(found.cpu(), torch_linear.linear(x, inputs, plain, None))


def check_experts(case: Experts, device: str) -> dict[str, Any]:
    """Hold experts against the reference; some of the tokens' experts are on another rank."""
    torch.manual_seed(0)
    x, linears = torch.randn(case.tokens, case.mixture.hidden).bfloat16(), case.mixture.linears("cpu")
    choice = case.mixture.choice(case.tokens, "cpu")
    choice.experts[choice.experts == 1] = -1
    gate_up, down = (
        each._replace(
            weight=torch_experts.prepare_experts(each.weight, lambda one: torch_linear.prepare_linear(one, 4, 1))
        )
        for each in linears
    )
    there = ExpertChoice(choice.weights.to(device), choice.experts.to(device))
    found = triton_experts.experts(x.to(device), there, *(prepared(each, device) for each in linears))
    return _compared(found.cpu(), torch_experts.experts(x, choice, gate_up, down))


def _on(device: str, arguments: list[Any]) -> list[Any]:
    def move(value: Any) -> Any:
        if isinstance(value, KVCalibration):
            return KVCalibration(*map(move, value))
        return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value

    return list(map(move, arguments))


def _compared(found: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
    error = ((found.float() - right.float()).abs().max() / right.float().abs().max()).item()
    return {"error": error, "right": error <= TOLERANCE}


if __name__ == "__main__":
    main()
