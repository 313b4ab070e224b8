"""Triton's kernels under its interpreter, in this process alone: servers that tests start choose for themselves.

Triton reads the variable when its own functions and ours are defined, so this comes before all that imports it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import triton.experimental.gluon  # noqa: F401 (or the first launch imports it, and looks for the variable)

from infoquant_vllm.kernels.triton import (
    configurations,
    int4_linear,
    kv4_attend,
    kv4_attention,
    kv4_store,
    kv4_tiles,
    linear,
    nibbles,
    rotate_quantize,
    weights,
)

del os.environ["TRITON_INTERPRET"]

__all__ = [
    "configurations",
    "int4_linear",
    "kv4_attend",
    "kv4_attention",
    "kv4_store",
    "kv4_tiles",
    "linear",
    "nibbles",
    "rotate_quantize",
    "weights",
]
