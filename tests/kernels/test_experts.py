"""Mixtures of experts: every token gets what the oracle's linears of its own experts give it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from infoquant_vllm.format import pack_codes
from infoquant_vllm.kernels.dispatch import BACKENDS, Backend
from infoquant_vllm.kernels.operands import ExpertChoice, ExpertLinear, InputQuant, PackedWeight
from infoquant_vllm.kernels.torch.elementwise import silu_and_mul
from infoquant_vllm.kernels.torch.experts import prepare_experts
from tests.common import oracles
from tests.common.libraries import RUNNABLE, library

EXPERTS, HIDDEN, INNER = 5, 96, 64
LAYOUTS = [(True, 1, 1), (False, 1, 1), (True, 2, 1), (False, 2, 2)]
"""Whether weights are symmetric, their groups, and segments of the inputs of down projections."""


@pytest.fixture(scope="module", params=["torch", *RUNNABLE])
def kernels(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Yield the backend in torch, and that of each library in turn."""
    if request.param == "torch":
        yield BACKENDS["reference"]()
        return
    with library(request.param):
        yield BACKENDS["cpu"]()


def random_weight(rows: int, features: int, symmetric: bool, groups: int, num_bits: int = 4) -> PackedWeight:
    """Make the weights of all experts as a checkpoint holds them."""
    low = -(2 ** (num_bits - 1)) if symmetric else 0
    codes = torch.randint(low, low + 2**num_bits, (EXPERTS, rows, features))
    zeros = torch.randint(0, 2**num_bits, (EXPERTS, rows, groups), dtype=torch.uint8)
    reach = torch.full_like(zeros, 8) if symmetric else torch.maximum(zeros, 15 - zeros)
    multiplier = 1 + (torch.rand(EXPERTS, rows, groups) * (127 // reach)).to(torch.uint8)
    return PackedWeight(
        torch.stack([pack_codes(part, num_bits, signed=symmetric) for part in codes]),
        (torch.rand(EXPERTS, rows, 1) + 0.5) / features**0.5 / (6 if groups > 1 else 1),
        None if groups == 1 else multiplier.clamp(max=127),
        None if symmetric else zeros,
    )


def random_experts(symmetric: bool = True, groups: int = 1, segments: int = 1) -> tuple[ExpertLinear, ExpertLinear]:
    """Make gate and up projections, and down projections with clip ratios of their own behind a Hadamard transform."""
    gate_up = InputQuant([], 0, 0.7 + 0.3 * torch.rand(1, 2), 4, symmetric=False)
    clips = 0.7 + 0.3 * torch.rand(EXPERTS, segments, 2)
    down = InputQuant([], INNER // segments, clips, 4, symmetric=False, segments=segments)
    return (
        ExpertLinear(gate_up, random_weight(2 * INNER, HIDDEN, symmetric, groups)),
        ExpertLinear(down, random_weight(HIDDEN, INNER, symmetric, groups)),
    )


def prepared(kernels: Any, linears: tuple[ExpertLinear, ...], num_bits: int = 4) -> list[ExpertLinear]:
    """The linears as kernels read them, with weights of `num_bits`."""
    return [
        ExpertLinear(
            inputs._replace(matrices=kernels.prepare_matrices([], inputs.hadamard)),
            prepare_experts(weight, partial(kernels.prepare_linear, num_bits=num_bits, segments=inputs.segments)),
        )
        for inputs, weight in linears
    ]


def one_by_one(x: torch.Tensor, choice: ExpertChoice, gate_up: ExpertLinear, down: ExpertLinear) -> torch.Tensor:
    """The same, a token and an expert at a time."""
    found = torch.zeros_like(x)
    for token, row in enumerate(x):
        total = torch.zeros(x.shape[1])
        for weight, expert in zip(choice.weights[token], choice.experts[token].tolist(), strict=True):
            if expert < 0:
                continue
            inner = silu_and_mul(oracles.linear(row[None], *of(expert, gate_up), None))
            total += weight * oracles.linear(inner, *of(expert, down), None)[0].float()
        found[token] = total.to(x.dtype)
    return found


def of(expert: int, linear: ExpertLinear) -> tuple[InputQuant, PackedWeight]:
    """One expert's linear."""
    inputs, clips = linear.inputs, linear.inputs.clip_ratio
    if clips is not None and clips.dim() == 3:
        inputs = inputs._replace(clip_ratio=clips[expert])
    parts = (None if part is None else part[expert] for part in linear.weight)
    return inputs, PackedWeight(*parts)  # type: ignore[arg-type]


def random_choice(tokens: int, chosen: int) -> ExpertChoice:
    order = torch.rand(tokens, EXPERTS).argsort(1)[:, :chosen].to(torch.int32)
    return ExpertChoice(torch.rand(tokens, chosen), order)


@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_get_the_weighted_sums_of_their_experts(
    kernels: Backend, tokens: int, dtype: torch.dtype, chosen: int, layout: tuple[bool, int, int]
) -> None:
    torch.manual_seed(tokens)
    linears, x, choice = random_experts(*layout), torch.randn(tokens, HIDDEN).to(dtype), random_choice(tokens, chosen)
    found = kernels.experts(x, choice, *prepared(kernels, linears))
    assert found.dtype == dtype
    assert torch.equal(found, one_by_one(x, choice, *linears))


def test_experts_of_other_ranks_add_nothing(kernels: Backend) -> None:
    torch.manual_seed(0)
    gate_up, down = prepared(kernels, random_experts())
    x, choice = torch.randn(9, HIDDEN), random_choice(9, 2)
    run = partial(kernels.experts, x, gate_up=gate_up, down=down)
    here = torch.where(choice.experts < 3, choice.experts, -1)
    there = torch.where(choice.experts >= 3, choice.experts, -1)
    parts = run(choice._replace(experts=here)), run(choice._replace(experts=there))
    torch.testing.assert_close(parts[0] + parts[1], run(choice))
    assert not run(choice._replace(experts=torch.full_like(choice.experts, -1))).any()
