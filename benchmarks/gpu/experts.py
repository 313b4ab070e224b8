"""Mixtures of experts on this GPU: W4A4 beside vLLM's own fused experts in bf16 and FP8, as its layers call them.

A row is a model, a number of tokens and a kernel, with the microseconds of a call in a CUDA graph. Tokens choose their
experts at random; calls with other choices take turns, so that few tokens read weights that are not in the L2 cache.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

from benchmarks.gpu.bench import Bench, parser
from benchmarks.gpu.mixtures import Mixture, prepared
from benchmarks.gpu.timing import microseconds
from benchmarks.gpu.vllm_layers import one_worker
from infoquant_vllm.kernels.operands import ExpertChoice
from infoquant_vllm.kernels.triton.experts import experts

TOKENS = (1, 16, 64, 256, 2048)
SMALL_TOKENS = (2,)
CHOICES = 16
Calls = list[Callable[[], Any]]


MIXTURES = {"Qwen3-30B-A3B": Mixture(2048, 768, 128, 8), "Mixtral-8x7B": Mixture(4096, 14336, 8, 2)}
SMALL_MIXTURES = {"small": Mixture(128, 96, 4, 2)}


def main() -> None:
    """Time each mixture at each number of tokens."""
    bench = Bench.of("experts", parser("experts", __doc__).parse_args())
    with one_worker(bench.device):
        for name, mixture in (SMALL_MIXTURES if bench.dry_run else MIXTURES).items():
            measure(bench, name, mixture)


def measure(bench: Bench, name: str, mixture: Mixture) -> None:
    """Write the rows of a mixture, a kernel's weights after the other's; they are freed behind it."""
    for kernel, make in kernels(mixture, bench.device):
        made: list[Callable[[torch.Tensor, ExpertChoice], torch.Tensor]] = []

        def prepare(make: Callable[[], Any] = make, made: list[Any] = made) -> dict[str, Any]:
            torch.manual_seed(0)
            made.append(make())
            return {}

        bench.attempt(prepare, mixture=name, kernel=kernel)
        for tokens in (SMALL_TOKENS if bench.dry_run else TOKENS) if made else ():
            timed = partial(_time, made[0], mixture, tokens, bench.device)
            bench.attempt(timed, mixture=name, kernel=kernel, tokens=tokens)


def _time(
    call: Callable[[torch.Tensor, ExpertChoice], torch.Tensor], mixture: Mixture, tokens: int, device: str
) -> dict[str, float | None]:
    x = torch.randn(tokens, mixture.hidden, device=device, dtype=torch.bfloat16)
    calls: Calls = [partial(call, x, mixture.choice(tokens, device)) for _ in range(CHOICES)]
    return {"us": microseconds(calls[:1] if device == "cpu" else calls, device)}


def kernels(mixture: Mixture, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each kernel's name and what makes a call of (x, choice) with random weights."""
    yield "W4A4", partial(quantized, mixture, device)
    yield "W4A4 in groups", partial(quantized, mixture._replace(weight_group=32 if device == "cpu" else 64), device)
    if device != "cpu":
        yield "vLLM's bf16", partial(fused, mixture, False)
        yield "vLLM's FP8", partial(fused, mixture, True)


def quantized(mixture: Mixture, device: str) -> Callable[[torch.Tensor, ExpertChoice], torch.Tensor]:
    """Return our experts."""
    linears = [prepared(linear, device) for linear in mixture.linears(device)]
    return lambda x, choice: experts(x, choice, *linears)


def fused(mixture: Mixture, fp8: bool) -> Callable[[torch.Tensor, ExpertChoice], torch.Tensor]:
    """Return vLLM's Triton experts; with FP8 scales are per token and per channel."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts  # which not every platform has

    count, hidden, inner = mixture.experts, mixture.hidden, mixture.intermediate
    first = torch.randn(count, 2 * inner, hidden, device="cuda", dtype=torch.bfloat16) / 64
    second = torch.randn(count, hidden, inner, device="cuda", dtype=torch.bfloat16) / 64
    config = None
    if fp8:
        first_scale, second_scale = (torch.rand(count, each.shape[1], 1, device="cuda") for each in (first, second))
        config = fp8_w8a8_moe_quant_config(first_scale, second_scale, per_act_token_quant=True, per_out_ch_quant=True)
        first, second = first.to(torch.float8_e4m3fn), second.to(torch.float8_e4m3fn)
    return lambda x, choice: fused_experts(x, first, second, choice.weights, choice.experts, quant_config=config)


if __name__ == "__main__":
    main()
