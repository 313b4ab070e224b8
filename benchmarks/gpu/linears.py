"""The linears of a LLaMA-3-8B layer on this GPU: W4A4 beside cuBLAS bf16, FP8, INT8 and a W4A16 kernel of PyTorch.

A row is a site, a number of tokens and a kernel, with the microseconds of a call in a CUDA graph. FP8 and INT8 are
products alone, of inputs quantized already, so that they bound what such formats can reach.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, parser
from benchmarks.gpu.sites import QuantizedLinear, Site, sites
from benchmarks.gpu.timing import copies, microseconds

TOKENS = (1, 16, 32, 33, 48, 64, 128, 256, 512, 2048, 8192)
SMALL_TOKENS = (2,)
W4A16_GROUP, W4A16_TOKENS = 128, 64
INT8_TOKENS = 17
"""The fewest that `torch._int_mm` takes."""
Calls = list[Callable[[], Any]]


def main() -> None:
    """Time each site at each number of tokens."""
    bench = Bench.of("linears", parser("linears", __doc__).parse_args())
    for name, site in sites(bench.dry_run).items():
        measure(bench, name, site)


def measure(bench: Bench, name: str, site: Site) -> None:
    """Write the rows of one site; its weights are freed behind it."""
    torch.manual_seed(0)
    ours = {"W4A4": QuantizedLinear(site, bench.device)}
    ours["W4A4 in groups"] = QuantizedLinear(site.in_groups(), bench.device)
    number = copies(2 * site.features * site.channels, bench.device)
    dense = torch.randn(number, site.channels, site.features, device=bench.device, dtype=torch.bfloat16)
    for tokens in SMALL_TOKENS if bench.dry_run else TOKENS:
        x = torch.randn(tokens, site.features, device=bench.device, dtype=torch.bfloat16)
        for kernel, make in kernels(ours, dense, x):
            facts = {"site": name, "tokens": tokens, "kernel": kernel}
            bench.attempt(partial(timed, make, bench.device), **facts)


def timed(make: Callable[[], Calls], device: str) -> dict[str, float | None]:
    """Return the time of calls that are yet to make."""
    return {"us": microseconds(make(), device)}


def kernels(
    ours: dict[str, QuantizedLinear], dense: torch.Tensor, x: torch.Tensor
) -> Iterator[tuple[str, Callable[[], Calls]]]:
    """Yield each kernel's name and what makes its calls on x [tokens, features], dense [copies, channels, features]."""
    tokens = len(x)
    for name, made in ours.items():
        yield name, partial(made.calls, x)
        yield f"{name}, quantizer alone", partial(made.quantizer_calls, x)
        yield f"{name}, product alone", partial(made.product_calls, x)
    yield "bf16", lambda: [partial(torch.nn.functional.linear, x, weight) for weight in dense]
    if x.device.type == "cpu":
        return
    yield "FP8, product alone", partial(fp8_calls, dense, x)
    if tokens >= INT8_TOKENS:
        yield "INT8, product alone", partial(int8_calls, dense, x)
    if tokens <= W4A16_TOKENS:
        yield "W4A16 of PyTorch", partial(w4a16_calls, dense, x)


def fp8_calls(dense: torch.Tensor, x: torch.Tensor) -> Calls:
    """Return products with a scale per token and per channel."""
    weights, codes = dense.to(torch.float8_e4m3fn), x.to(torch.float8_e4m3fn)
    product = partial(
        torch._scaled_mm,
        scale_a=torch.ones(len(x), 1, device=x.device),
        scale_b=torch.ones(1, dense.shape[1], device=x.device),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return [partial(product, codes, weight.t()) for weight in weights]


def int8_calls(dense: torch.Tensor, x: torch.Tensor) -> Calls:
    """Return products into int32."""
    weights, codes = dense.to(torch.int8), x.to(torch.int8)
    return [partial(torch._int_mm, codes, weight.t()) for weight in weights]


def w4a16_calls(dense: torch.Tensor, x: torch.Tensor) -> Calls:
    """Return PyTorch's own weight-only products, weights in groups."""
    _, channels, features = dense.shape
    packed = torch.randint(0, 256, (channels, features // 2), dtype=torch.uint8, device=x.device)
    number = copies(packed.nbytes, x.device.type)
    weights = [torch._convert_weight_to_int4pack(packed, 8) for _ in range(number)]
    grid = torch.randn(features // W4A16_GROUP, channels, 2, device=x.device, dtype=torch.bfloat16)
    return [partial(torch._weight_int4pack_mm, x, weight, W4A16_GROUP, grid) for weight in weights]


if __name__ == "__main__":
    main()
