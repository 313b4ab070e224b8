"""Every compiled library that this CPU can run, one after the other."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from infoquant_vllm.kernels.native import library as native

RUNNABLE = native.runnable()


@contextmanager
def library(target: str) -> Iterator[None]:
    """Let the wrappers call that library, in place of the best one."""
    chosen = native._load(target, native.FOLDER / f"_native_{target}.so")
    assert chosen.handle is not None, chosen.problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: chosen)
        _forget_functions()
        yield
    _forget_functions()


def _forget_functions() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("infoquant_vllm.kernels.native."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
