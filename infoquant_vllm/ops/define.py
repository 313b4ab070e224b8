"""How an operation reaches torch.compile: opaque, by the compiled library itself or by Python."""

import os
from collections.abc import Callable
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from infoquant_vllm.kernels.cpu.library import library, operations
from infoquant_vllm.ops.table import FORCE


def define(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operation that `run` is; fake: its outputs' shapes and dtypes.

    Where the compiled library has an operation of that name it is this one, with no Python between torch and the
    kernel, which costs more than many a kernel when there are few tokens.
    """
    free = os.environ.get(FORCE, "cpu") == "cpu"  # any other word goes by the table, which refuses one it does not know
    if free and current_platform.is_cpu() and library().handle is not None and hasattr(operations(), name):
        torch.library.register_fake(f"{library().namespace}::{name}", fake)
        return getattr(operations(), name)
    direct_register_custom_op(f"infoquant_{name}", run, fake_impl=fake)
    return getattr(torch.ops.vllm, f"infoquant_{name}")
