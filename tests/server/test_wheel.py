"""The wheel of `make dist`, installed into a clean environment beside vLLM: its command runs, its plugin serves."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.common.server import Server, free_port, vllm_environment, wait_until_healthy
from hatch_build import TARGETS
from tests.common.checkpoints import write_random

DIST = Path(__file__).parents[2] / "dist"


def only(pattern: str) -> Path:
    found = list(DIST.glob(pattern))
    assert len(found) == 1, f"{DIST}: {len(found)} files match {pattern}, expected 1; run `make dist`"
    return found[0]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has this one's packages, but this project from its wheel alone.

    A .pth file adds this environment's site-packages behind its own; the .pth files in there, and so the editable
    installation, are not followed.
    """
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    wheel = only("*manylinux*.whl")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    (site / "vllm.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_native_library_and_no_sources() -> None:
    names = zipfile.ZipFile(only("*manylinux*.whl")).namelist()
    libraries = {f"infoquant_vllm/kernels/cpu/_native_{target}.so" for target in TARGETS}
    assert {name for name in names if name.endswith(".so")} == libraries
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert {name.split("/")[0] for name in names} == {"infoquant_vllm", "offline", "infoquant_vllm-0.1.0.dist-info"}


def test_the_wheel_for_other_platforms_holds_the_same_python_and_no_library() -> None:
    pure, native = (
        {
            name
            for name in zipfile.ZipFile(only(pattern)).namelist()
            if ".dist-info/" not in name and not name.endswith("/")
        }
        for pattern in ("*-none-any.whl", "*manylinux*.whl")
    )
    assert pure == {name for name in native if not name.endswith(".so")}


def test_the_source_distribution_holds_what_a_build_and_the_tests_need() -> None:
    with tarfile.open(only("*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    source = "infoquant_vllm/kernels/cpu/csrc/bindings/library.cpp"
    assert {"hatch_build.py", source, "tests/conftest.py", "LICENSE"} <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith(("benchmarks/results", ".demo"))]


def test_the_command_of_the_wheel_runs(python: Path, tmp_path: Path) -> None:
    assert "quantize" in run(python.with_name("infoquant"), "--help", cwd=tmp_path)
    code = "import offline, infoquant_vllm; print(offline.__file__, infoquant_vllm.__file__)"
    where = run(python, "-c", code, cwd=tmp_path)
    assert all(str(python.parent.parent) in file for file in where.split())


def test_a_server_beside_the_wheel_answers_with_the_wheels_kernels(python: Path, tmp_path: Path) -> None:
    checkpoint, log, port = write_random(tmp_path / "checkpoint"), tmp_path / "server.log", free_port()
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(checkpoint), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--enforce-eager", "--max-model-len", "256", "--skip-tokenizer-init"]
    environment = {name: value for name, value in vllm_environment().items() if name != "PYTHONPATH"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    server = Server(checkpoint, port, log, process)
    try:
        wait_until_healthy(server)
        answer = server.client().completions.create(
            model=str(checkpoint), prompt=[5, 6, 7], max_tokens=4, extra_body={"return_token_ids": True}
        )
        assert len(answer.choices[0].model_extra["token_ids"]) == 4
        assert "native" in server.logged(r"infoquant: (.+)")
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_what_an_image_copies_is_there(name: str) -> None:
    file = DIST.parent / "packaging" / "containers" / f"Containerfile.{name}"
    copied = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("COPY ")]
    assert copied
    for pattern in copied:
        assert list(DIST.parent.glob(pattern)), f"{file.name} copies {pattern}, which is not there; run `make dist`"
