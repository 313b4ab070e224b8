"""Tests of the Triton kernels would find a mask that is off by one: here one is, and the comparison fails."""

import ast
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from infoquant_vllm.kernels.torch import kv_cache as cpu
from tests.common.interpreted import (
    attend,
    attention,
    common,
    decode,
    experts,
    gemm,
    grouped,
    interpreter_only,
    kv_store,
    linear,
    tiles,
)
from tests.kernels.test_kv_cache import Batch
from tests.kernels.triton.test_attention import TOLERANCE, Decoding
from tests.kernels.triton.test_experts import HIDDEN, Mixture, choice_of
from tests.kernels.triton.test_linear import Case

pytestmark = interpreter_only  # on a GPU a mask that is off by one writes to memory of others
MODULES = (attend, attention, common, decode, experts, gemm, grouped, kv_store, linear)
BATCHES: list[tuple[list[int], list[int], int | None]] = [([12], [30], None), ([1], [400], None), ([2], [130], None)]
"""Queries and tokens of sequences, and a window."""
SAME_RESULT = ("query < count",)  # a query that is left out here takes a round of its own


def masks(module: ModuleType) -> list[ast.Compare]:
    """Comparisons, by < or >=, that make what is called a mask."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any("mask" in ast.unparse(target) for target in node.targets):
            found += [each for each in ast.walk(node.value) if isinstance(each, ast.Compare)]
    return [
        each for each in found if isinstance(each.ops[0], ast.Lt | ast.GtE) and ast.unparse(each) not in SAME_RESULT
    ]


def mutated(module: ModuleType, line: int, column: int, folder: Path) -> ModuleType:
    """The module made again from its file, with the comparison at a place narrower by one, under the interpreter."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and (node.lineno, node.col_offset) == (line, column):
            step = ast.Sub() if isinstance(node.ops[0], ast.Lt) else ast.Add()
            node.comparators[0] = ast.BinOp(node.comparators[0], step, ast.Constant(1))
    file = folder / f"{module.__name__.rpartition('.')[2]}.py"
    file.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    spec = importlib.util.spec_from_file_location(f"mutated_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        spec.loader.exec_module(made)
    finally:
        del os.environ["TRITON_INTERPRET"]
    return made


def compare_gemm() -> None:
    Case(17, 192, channels=48).check()
    Case(17, 192, channels=48, segments=2).check()
    compare_experts()


def compare_experts() -> None:
    Mixture().check(torch.randn(11, HIDDEN).bfloat16(), choice_of("holes", 11))


def compare_store() -> None:
    batch = Batch([1], [21], 1, 1, 96)
    assert torch.equal(batch.store(kv_store), batch.store(cpu))


def compare_attention() -> None:
    for counts, lens, window in BATCHES:
        batch = Batch(counts, lens, 3, 1, 96, dtype=torch.float32)
        batch.query /= 16  # so that every token counts
        cache = batch.store(cpu)
        expected = batch.attend(cpu, cache, window)
        found = batch.attend(Decoding(max(counts)) if max(counts) < 9 else attention, cache, window)
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


COMPARED: dict[ModuleType, Callable[[], None]] = {
    gemm: compare_gemm,
    grouped: compare_experts,
    kv_store: compare_store,
    attend: compare_attention,
    attention: compare_attention,
    decode: compare_attention,
}


@pytest.fixture(autouse=True)
def _memory_that_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "SEQUENCE_SPLITS", 8)
    torch.use_deterministic_algorithms(True)  # which fills what is allocated
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("compare", [compare_gemm, compare_experts, compare_store, compare_attention])
def test_kernels_are_the_reference(compare: Callable[[], None]) -> None:
    compare()


@pytest.mark.parametrize(
    ("module", "line", "column"),
    [
        pytest.param(module, node.lineno, node.col_offset, id=f"{module.__name__[-9:]}: {ast.unparse(node)}")
        for module in COMPARED
        for node in masks(module)
    ],
)
def test_a_mask_that_is_off_by_one_is_found(
    module: ModuleType, line: int, column: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mutated(module, line, column, tmp_path)
    original = dict(vars(module))
    for user in MODULES:
        for name, value in list(vars(user).items()):
            function = getattr(value, "fn", value)  # behind what Triton makes of it
            if value is original.get(name) and getattr(function, "__module__", "") == module.__name__:
                monkeypatch.setattr(user, name, vars(made)[name])
    with pytest.raises((AssertionError, IndexError)):
        COMPARED[module]()
