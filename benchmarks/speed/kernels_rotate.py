"""What transforming and quantizing an input costs beside the product that it is for."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common.interleaved import Candidate, time_interleaved
from benchmarks.speed.products import int4_linear
from infoquant_vllm.kernels.cpu import rotate_quantize as native
from infoquant_vllm.kernels.torch import rotate_quantize as plain

TOKENS = (1, 256)
CASES = (  # features, channels of the product, size of a Hadamard, shapes of learned matrices, groups
    ("no transform", 4096, 4096, 0, (), 1),
    ("no transform, groups of 64", 4096, 4096, 0, (), 64),
    ("Hadamard 4096", 4096, 4096, 4096, (), 1),
    ("Kronecker 64 x 64", 4096, 4096, 0, ((64, 64), (64, 64)), 1),
    ("Hadamard 28 x 512", 14336, 4096, 14336, (), 1),
    ("Hadamard 12 x 128", 1536, 576, 1536, (), 1),
    ("Kronecker 12 x 128", 1536, 576, 0, ((12, 12), (128, 128)), 1),
    ("2 blocks of 288", 576, 3072, 0, ((2, 288, 288),), 1),
    ("9 blocks of 64", 576, 576, 0, ((9, 64, 64),), 9),
)


def rotate_rows(seconds: float) -> list[dict[str, Any]]:
    """rotate_quantize to 4 bits, the compiled one and torch's, as shares of the product's time."""
    rows = []
    for tokens in TOKENS:
        for name, features, channels, hadamard, shapes, groups in CASES:
            x, matrices = torch.randn(tokens, features).bfloat16(), [torch.randn(shape) for shape in shapes]
            args = (x, matrices, hadamard, torch.ones(groups, 2), 4, False)
            candidates = {
                "int4_linear": int4_linear(tokens, features, channels, 4, 1),
                name: _call(native.rotate_quantize, args),
                f"{name} (torch)": _call(plain.rotate_quantize, args),
            }
            shape = {"operation": "rotate_quantize", "tokens": tokens, "features": features, "channels": channels}
            rows += [shape | row for row in time_interleaved(candidates, seconds)]
    return rows


def _call(run: Callable[..., Any], args: tuple[Any, ...]) -> Candidate:
    return lambda _: run(*args)
