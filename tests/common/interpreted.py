"""Triton's kernels for the tests: under its interpreter or, with INFOQUANT_TEST_DEVICE=cuda, compiled and on a GPU.

The interpreter is for this process alone: servers that tests start choose for themselves. Triton reads its variable
when its own functions and ours are defined, so this comes before all that imports it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1" if os.environ.get("INFOQUANT_TEST_DEVICE", "cpu") == "cpu" else "0"

import pytest
import triton.experimental.gluon  # noqa: F401 (or the first launch imports it, and looks for the variable)

from infoquant_vllm.kernels.triton import (
    attend,
    attention,
    common,
    decode,
    experts,
    gemm,
    grouped,
    kv_store,
    linear,
    rotate_quantize,
    tiles,
    weights,
)
from tests.common import chained
from tests.common.moved import moved

del os.environ["TRITON_INTERPRET"]

DEVICE = os.environ.get("INFOQUANT_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    for module, name in (
        (chained, "chained"),
        (attention, "kv_attention"),
        (decode, "kv_decode"),
        (experts, "experts"),
        (kv_store, "kv_store"),
        (linear, "gemm"),
        (linear, "linear"),
        (rotate_quantize, "rotate_quantize"),
    ):
        setattr(module, name, moved(getattr(module, name), DEVICE))

interpreter_only = pytest.mark.skipif(DEVICE != "cpu", reason="tests the interpreter or what runs on a CPU")

__all__ = [
    "attend",
    "attention",
    "chained",
    "common",
    "decode",
    "experts",
    "gemm",
    "grouped",
    "interpreter_only",
    "kv_store",
    "linear",
    "rotate_quantize",
    "tiles",
    "weights",
]
