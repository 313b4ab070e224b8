"""Every compiled library that this CPU can run, one after the other."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from infoquant_vllm.kernels.cpu import library as native

RUNNABLE = native.runnable()


@contextmanager
def library(target: str) -> Iterator[None]:
    """Let the wrappers call that library, in place of the best one."""
    chosen = native._load(target, native.FOLDER / f"_native_{target}.so")
    assert chosen.handle is not None, chosen.problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: chosen)
        yield
