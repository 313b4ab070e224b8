"""The Triton kernels compile for every architecture, with every Triton that they may meet; see benchmarks/compiled.py.

In processes of their own: in this one Triton may interpret.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common.interpreted import interpreter_only

pytestmark = interpreter_only  # compiling all takes minutes, and nothing runs on a GPU
ROOT = Path(__file__).parents[3]
TRITONS = [
    line.split()[0].partition("==")[2]
    for line in (ROOT / "requirements" / "tritons.txt").read_text().splitlines()
    if line.startswith("triton==")
]
OF_THE_GPU_MACHINE = ("3.6.0",)
"""Tritons that no supported vLLM pins: only the bare machine of `make gpu-pack`, a Hopper, has one."""
SMALL = (
    "widest_rows or slot_of_its or tables_tile or formats_are or groups_behind or linear_is or limits or bits_of_keys "
    "or context_ends or nan_or"
)
"""Of the kernels' tests: each kernel once or more."""


def run(*arguments: str | Path, path: Path = ROOT, **variables: str) -> str:
    """Output of a Python process with `path` before all other packages; raises AssertionError where it fails."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = kept | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"} | variables
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


def folder(version: str) -> Path:
    """Where `make test` installs another Triton."""
    found = Path(sys.prefix) / f"triton-{version}"
    if not found.exists():
        pytest.skip(f"{found} is not there: make {found.relative_to(Path(sys.prefix).parent)}")
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("--archs", "80", "90", "100", "--others", "90"),
        ("--archs", "86", "120", "--presets", "fast", "best"),  # sm_89 has the PTX of sm_86
    ],
    ids=["all", "fast and best"],
)
def test_every_variant_compiles_without_spills_but_the_known(arguments: tuple[str, ...], triton_cache: Path) -> None:
    """`python -m benchmarks.compiled` compiles everything for every architecture."""
    print(run("-m", "benchmarks.compiled", *arguments, TRITON_CACHE_DIR=str(triton_cache)))


@pytest.mark.parametrize("version", TRITONS)
def test_what_serves_a_llama_compiles_with_other_tritons(version: str, tmp_path: Path) -> None:
    archs = ("90",) if version in OF_THE_GPU_MACHINE else ("90", "100")  # sm_80's products are the oldest in Triton
    arguments = ("--presets", "fast", "best", "--archs", *archs)
    out = run("-m", "benchmarks.compiled", *arguments, path=folder(version), TRITON_CACHE_DIR=str(tmp_path))
    assert out.startswith(f"Triton {version}: ")


@pytest.mark.parametrize("version", TRITONS)
def test_kernels_are_the_references_with_other_tritons(version: str) -> None:
    arguments = ("-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", "-k", SMALL)
    files = [
        Path(__file__).with_name(f"test_{name}.py")
        for name in ("linear", "experts", "rotate_quantize", "kv_store", "attention", "nan")
    ]
    run(*arguments, *files, path=folder(version))


def test_variants_are_those_of_tritons_own_binder_and_serve_any_number_of_tokens(triton_cache: Path) -> None:
    file = ROOT / "tests" / "common" / "compiled_variants.py"
    run("-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", file, TRITON_CACHE_DIR=str(triton_cache))
