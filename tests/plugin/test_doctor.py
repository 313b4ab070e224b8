"""`infoquant doctor`: what is in order, what is not, and how to fix it."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from infoquant_vllm import doctor
from infoquant_vllm.doctor import Finding
from infoquant_vllm.kernels.cpu import library as native
from infoquant_vllm.kernels.cpu.library import Library
from tests.offline.cli.test_main import INFOQUANT


def test_this_installation_is_in_order_and_json_is_all_that_is_printed() -> None:
    done = subprocess.run([*INFOQUANT, "doctor", "--json"], capture_output=True, text=True, timeout=120, check=False)
    found = [Finding(**each) for each in json.loads(done.stdout)]
    assert all(each.in_order and not each.advice for each in found), found
    assert done.returncode == 0
    assert {"Python", "vllm", "plugin", "CPU kernels", "torch.compile", "vLLM's platform"} <= {
        each.subject for each in found
    }


def test_what_is_not_in_order_has_exit_code_1_and_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = subprocess.run([*INFOQUANT, "doctor"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "unset VLLM_PLUGINS, or add infoquant" in done.stdout
    assert "no-such-compiler: missing" in done.stdout
    assert "--enforce-eager" in done.stdout


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None  # which makes its import fail
sys.argv = ["infoquant", *sys.argv[2:]]
from offline.cli.main import main
main()
"""


@pytest.mark.parametrize("package", ["torch", "vllm.platforms"])
def test_missing_package_is_a_finding_and_no_traceback(package: str) -> None:
    command = [sys.executable, "-c", WITHOUT, package, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    (finding,) = (each for each in json.loads(done.stdout) if each["subject"] == "kernels")
    assert package in finding["found"]
    assert not finding["in_order"]


def test_other_commands_without_torch_point_to_the_doctor(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, "torch", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.endswith("torch halted; None in sys.modules; `infoquant doctor` says what is missing\n")


def test_distribution_that_is_not_installed_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-package")
    assert [each.found for each in doctor.packages()][1:] == ["not installed"]


@pytest.mark.parametrize(
    ("requirement", "in_order", "found"),
    [
        ("pytest>=8", True, metadata.version("pytest")),
        ("pytest<8", False, f"{metadata.version('pytest')}, tested with <8"),
        ("no-such-package>=1", False, "not installed"),
    ],
)
def test_packages_are_held_against_their_ranges(requirement: str, in_order: bool, found: str) -> None:
    finding = doctor.package(Requirement(requirement))
    assert (finding.in_order, finding.found) == (in_order, found)
    assert finding.advice == ("" if in_order else f"pip install '{requirement}'")


def test_a_package_that_is_not_a_plugin_of_this_vllm_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    assert not doctor.plugin().in_order


@pytest.mark.parametrize(
    ("runnable", "loaded", "found", "advice"),
    [
        ([], Library("", None, "no AVX2"), "no AVX2 here", "x86-64"),
        (["avx2"], Library("avx2", None, "not compiled"), "avx2 cannot be used (not compiled)", "g++"),
        (["avx512vnni", "avx2"], Library("avx2", object()), "this CPU has avx512vnni", "newer compiler"),  # type: ignore[arg-type]
        (["avx2"], Library("avx2", object()), "", ""),  # type: ignore[arg-type]
    ],
)
def test_kernels_are_in_order_where_the_best_serve(
    monkeypatch: pytest.MonkeyPatch, runnable: list[str], loaded: Library, found: str, advice: str
) -> None:
    monkeypatch.setattr(native, "runnable", lambda: runnable)
    monkeypatch.setattr(native, "library", lambda: loaded)
    finding = doctor.cpu_kernels()
    assert finding.in_order == (not advice)
    assert found in finding.found
    assert advice in finding.advice


def test_missing_headers_of_python_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    assert f"{tmp_path}/Python.h: missing" in doctor.compiler().found
