"""The compiled kernels: how they are built and found, and what happens where they are not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hatch_build import FOLDER, TARGETS, compile_native
from infoquant_vllm.kernels.cpu import library as native
from infoquant_vllm.kernels.dispatch import backend
from infoquant_vllm.summary import Summary


@pytest.fixture(autouse=True)
def _fresh_choice() -> Iterator[None]:
    """Let every test choose its library again, and later tests too."""
    native.library.cache_clear()
    backend.cache_clear()
    yield
    native.library.cache_clear()
    backend.cache_clear()


def _summary_line() -> str:
    summary = Summary(pending=2)
    summary.linear(f"W4A4 ({backend('cpu').name})", 2**20, 2**22)
    return summary.line()


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx2"), reason="no library for this CPU")
def test_the_library_for_this_cpu_loads_into_torchs_own_openmp() -> None:
    code = (
        "from infoquant_vllm.kernels.cpu.library import library; assert library().handle, library().problem; "
        "maps = [line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line]; "
        "assert len(set(maps)) == 1, set(maps)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert native.library().problem == ""
    assert "no native" not in _summary_line()


def test_without_a_library_torch_serves_and_the_summary_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert backend("cpu").linear.__module__.startswith("infoquant_vllm.kernels.torch")
    line = _summary_line()
    assert "1 linears W4A4 (torch)" in line
    assert line.endswith("no native kernels (not compiled, `pip install -v` says why)")
    with pytest.raises(RuntimeError, match="not compiled"):
        native.operations()


def test_a_cpu_without_avx2_has_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "arm64"})
    assert native.library().problem == "this CPU has no AVX2"


def test_the_best_target_is_chosen_by_the_cpus_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    features = dict.fromkeys(native.TARGETS["avx2"].capabilities, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert native.library().target == "avx2"
    for target in ("avx512vnni", "amx"):
        features |= dict.fromkeys(native.TARGETS[target].capabilities, True)
        native.library.cache_clear()
        assert native.library().target == target


def test_a_library_of_other_sources_or_none_at_all_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "abi.cpp"
    for text, problem in (
        ('extern "C" long infoquant_abi_version() { return 0; }', "version 0"),
        ('extern "C" long other() { return 0; }', "undefined symbol"),
    ):
        source.write_text(text)
        file = tmp_path / f"{problem[:3]}.so"
        subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(file)], check=True)
        found = native._load("avx2", file)
        assert found.handle is None
        assert problem in found.problem


def test_every_target_was_compiled_when_the_package_was_installed() -> None:
    assert {file.name for file in FOLDER.glob("*.so")} == {f"_native_{target}.so" for target in TARGETS}
    assert all(native._load(target, FOLDER / f"_native_{target}.so").handle for target in native.runnable())


@pytest.mark.skipif(len(native.runnable()) < 2, reason="one library at most for this CPU")
def test_where_the_best_target_was_not_compiled_the_next_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, second = native.runnable()[:2]
    (tmp_path / f"_native_{second}.so").symlink_to(FOLDER / f"_native_{second}.so")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert native.library().target == second


@pytest.mark.parametrize(("compiler", "problem"), [("no-such-compiler", "No such file"), ("g++", "#error broken")])
def test_a_failed_compilation_is_reported_and_leaves_no_old_library(
    tmp_path: Path, compiler: str, problem: str
) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "broken.cpp").write_text("#error broken\n")
    (tmp_path / "_native_avx2.so").touch()
    problems = compile_native(tmp_path, compiler)
    assert len(problems) == len(TARGETS)
    assert all(problem in each for each in problems)
    assert [file.name for file in tmp_path.iterdir()] == ["csrc"]
