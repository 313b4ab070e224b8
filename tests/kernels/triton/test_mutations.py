"""Tests of the Triton kernels would find a mask that is off by one: here masks are, and the comparisons fail."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from infoquant_vllm.kernels.torch import kv_cache as cpu
from tests.common.interpreted import (
    epilogue,
    int4_linear,
    interpreter_only,
    kv4_attend,
    kv4_attention,
    kv4_decode,
    kv4_store,
    kv4_tiles,
)
from tests.kernels.test_kv_cache import Batch
from tests.kernels.triton import test_linear as products
from tests.kernels.triton.test_attention import TOLERANCE, Decoding

pytestmark = interpreter_only  # on a GPU a mask that is off by one writes to what is not the test's
MUTATIONS = [
    (kv4_attend, "(age >= 0) & (age < WINDOW)", "(age > 0) & (age < WINDOW)"),
    (kv4_attend, "(age >= 0) & (age < WINDOW)", "(age >= 0) & (age <= WINDOW)"),
    (kv4_attend, "else age >= 0", "else age >= -1"),
    (kv4_attend, "else age >= 0", "else age > 0"),
    (kv4_attend, "tokens < end\n", "tokens < end - 1\n"),
    (kv4_decode, "+ done + taken)", "+ done + taken - 1)"),
    (kv4_decode, "chunks = position // CHUNK + 1 - first", "chunks = position // CHUNK - first"),
    (kv4_decode, "there = row < QUERIES * GROUP", "there = row < QUERIES * GROUP - 1"),
    (kv4_decode, "& (own_share == share)", ""),
    (kv4_decode, "parts = tl.max(tl.where(there, own_parts, 0), 0)", "parts = parts"),
    (kv4_decode, "there = part < parts", "there = part <= parts"),
    (kv4_attention, "(query < end - start)", "(query < end - start - 1)"),
    (kv4_store, "written = slots >= 0", "written = slots > 0"),
    (kv4_store, "mask=rows < num_tokens", "mask=rows < num_tokens - 1"),
    (kv4_store, "(place < HEAD // 2)", "(place < HEAD // 2 - 1)"),
    (kv4_store, "(place < STORED)", "(place < STORED - 1)"),
    (int4_linear, "n_mask, m_mask = n < N, m < M", "n_mask, m_mask = n < N - 1, m < M"),
    (int4_linear, "n_mask, m_mask = n < N, m < M", "n_mask, m_mask = n <= N, m < M"),
    (int4_linear, "n_mask, m_mask = n < N, m < M", "n_mask, m_mask = n < N, m < M - 1"),
    (int4_linear, "n_mask, m_mask = n < N, m < M", "n_mask, m_mask = n < N, m <= M"),
    (int4_linear, "is_group = group < groups", "is_group = group < groups - 1"),
    (epilogue, "(token < M // ROWS)", "(token < M // ROWS - 1)"),
    (epilogue, "(token < M // ROWS)", "(token <= M // ROWS)"),
]


BATCHES: list[tuple[list[int], list[int], int, int | None]] = [
    ([1], [129], 3, None),
    ([1, 9], [40, 70], 3, 20),
    ([9, 1], [70, 128], 3, None),
    ([1], [1025], 1, None),
    ([4], [1026], 1, None),
    ([3], [130], 1, None),
]


def copy_of(module: ModuleType, folder: Path, original: str = "", changed: str = "") -> ModuleType:
    """The module made again from its file with `original` replaced, under the interpreter."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(original) >= 1, f"{original!r} is not in {module.__file__}: name what took its place"
    file = folder / f"{module.__name__.rpartition('.')[2]}.py"
    file.write_text(source.replace(original, changed) if original else source)
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


def compare(made: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises AssertionError where a copy of a module computes something else than the reference."""
    name = made.__name__.removeprefix("mutated_")
    if name in ("int4_linear", "epilogue"):
        if name == "epilogue":
            monkeypatch.setattr(int4_linear, "finish", made.finish)
        else:
            monkeypatch.setattr(products, "int4_linear", made)
        for case in (products.Case(33, 192, channels=48), products.Case(5, 288, (3, 9), signed=False, channels=16)):
            case.check()
        return
    monkeypatch.setattr(kv4_tiles, "PARTS", 8)
    if name == "kv4_attend":
        monkeypatch.setattr(kv4_attention, "attend", made.attend)
        monkeypatch.setattr(kv4_decode, "attend", made.attend)
    if name == "kv4_decode":
        for changed in ("decode_scratch", "kv_decode"):
            monkeypatch.setattr(kv4_decode, changed, getattr(made, changed))
    attention = made if name == "kv4_attention" else kv4_attention
    for counts, lens, heads, window in BATCHES:
        batch = Batch(counts, lens, heads, 1, 64, dtype=torch.float32)
        batch.query /= 16  # so that every token counts
        cache = batch.store(cpu)
        if name == "kv4_store":
            assert torch.equal(batch.store(made), cache)
            continue
        kernels = Decoding(max(counts)) if max(counts) < 9 else attention
        found, expected = (batch.attend(each, cache, window) for each in (kernels, cpu))
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture(autouse=True)
def _memory_that_is_not_a_number() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # which fills what is allocated
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "module", [kv4_attend, kv4_attention, kv4_decode, kv4_store, int4_linear], ids=lambda m: m.__name__[-13:]
)
def test_a_copy_is_the_reference(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(copy_of(module, tmp_path), monkeypatch)


@pytest.mark.parametrize(("module", "original", "changed"), MUTATIONS, ids=[changed for _, _, changed in MUTATIONS])
def test_a_mask_that_is_off_by_one_is_found(
    module: ModuleType, original: str, changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((AssertionError, IndexError)):
        compare(copy_of(module, tmp_path, original, changed), monkeypatch)
