"""What a launch is compiled for; run by kernels/triton/test_compiled.py, in a process whose Triton compiles."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.compiled import variants
from benchmarks.static.experts import MIXTURES, experts_call
from benchmarks.static.kernels import linear_call
from benchmarks.static.kv_kernels import Cache, attention_call, store_call
from benchmarks.static.launches import Launch, launches
from benchmarks.static.variants import linear_call as whole_linear_call
from benchmarks.static.variants import linear_scheme
from infoquant_vllm.format import InputTransform

TARGET = GPUTarget("cuda", 90, 32)
CACHE = Cache(8, 2, 64)
TOKENS = (1, 15, 16, 17)


def bound(launch: Launch) -> list[Any]:
    """What Triton itself makes of a launch's arguments: the type of each, and what it takes for granted of it."""
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, make_backend(TARGET))
    return binder(**launch.arguments)[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda tokens: attention_call(CACHE, tokens, 1, 1024),
        lambda tokens: attention_call(CACHE, tokens, 4, 1024),
        lambda tokens: attention_call(CACHE, tokens, 9, 1024),
        lambda tokens: attention_call(CACHE, 1, 8 + tokens, 1024),
        lambda tokens: store_call(CACHE, tokens),
        lambda tokens: whole_linear_call(linear_scheme(4, 4), 32 + tokens, 512, 64),
        lambda tokens: whole_linear_call(
            linear_scheme(4, 4, 32, 64, False, InputTransform(type="blocks", block_size=64)), 32 + tokens, 512, 64
        ),
        lambda tokens: experts_call(MIXTURES["Qwen3-30B-A3B"], "best", 32 + tokens),
    ],
    ids=["decode", "drafts", "prompts", "prompt", "store", "linear", "groups behind blocks", "experts"],
)
def test_a_variant_serves_any_number_of_tokens(call: Callable[[int], Callable[[], Any]]) -> None:
    found = [[bound(launch) for launch in launches(call(tokens), 90)] for tokens in TOKENS]
    assert found[0]
    assert all(other == found[0] for other in found)


def test_a_decoding_linear_has_a_variant_up_to_16_tokens() -> None:
    found = [[bound(launch) for launch in launches(linear_call(tokens, 4096, 4096), 90)] for tokens in TOKENS[:3]]
    assert len(found[0]) == 2
    assert found[0] == found[1] == found[2]


def test_a_source_is_what_triton_makes_of_a_launch() -> None:
    for variant in variants((90,), ("fast", "paper")):
        launch, source = variant.launch, variant.launch.source()
        for param, (kind, known) in zip(launch.kernel.params, bound(launch), strict=True):
            assert source.signature[param.name] == kind, param.name
            if kind != "constexpr":
                assert ((param.num,) in source.attrs) == (known == "D"), param.name


def ttgir(launch: Launch, arch: int = 90) -> str:
    """Triton's own code of a launch, after layouts were chosen and before instructions are."""
    target = GPUTarget("cuda", arch, 32)
    return str(triton.compile(launch.source(), target=target, options=launch.options).asm["ttgir"])


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("tokens", [16, 2048])
def test_four_nibbles_that_are_multiplied_together_lie_in_a_row(arch: int, tokens: int) -> None:
    """Their multiplier is that of the first: four of a row are together in a register in no other layout."""
    launch = launches(linear_call(tokens, 4096, 6144, group_size=64, signed=False), arch)[0]
    made = re.findall(r"mad\.lo.*-> tensor<\w+, (.*)> loc", ttgir(launch, arch), re.MULTILINE)
    assert len(made) >= 2
    assert all(each.startswith("#ttg.dot_op<{opIdx = 0,") and "kWidth = 4" in each for each in made)


@pytest.mark.parametrize(
    "call",
    [
        store_call(CACHE, 8),
        whole_linear_call(linear_scheme(4, 4), 8, 512, 64),
        whole_linear_call(linear_scheme(4, 8, transform=InputTransform(type="blocks", block_size=64)), 8, 512, 64),
    ],
    ids=["store", "rows", "blocks"],
)
def test_ranges_keep_nan(call: Callable[[], Any]) -> None:
    """Which the interpreter cannot show: there it is numpy that looks for extremes."""
    reductions = re.findall(r'"tt.reduce"\(.*?\}\)', ttgir(launches(call, 90)[0]), re.DOTALL)
    assert any("arith.maximumf" in each for each in reductions)
    assert not any("arith.maxnumf" in each or "arith.minnumf" in each for each in reductions)
