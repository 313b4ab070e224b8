"""Build hook: compiles the C++ CPU kernels into the package, one shared library per target."""

import importlib.util
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path(__file__).parent / "infoquant_vllm" / "kernels" / "cpu"
PURE = "INFOQUANT_PURE_WHEEL"
"""Environment variable: 1 leaves the native kernels out on purpose, for the wheel of all other platforms."""
# No -ffast-math and no contraction to fused multiply-adds: the order of roundings is part of what a kernel computes.
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared"]


def _load_targets() -> ModuleType:
    """Load targets.py by its path: importing its package needs torch, which a build environment may lack."""
    spec = importlib.util.spec_from_file_location("targets", FOLDER / "targets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_targets = _load_targets()
TARGETS = _targets.TARGETS


class NativeKernels(BuildHookInterface):
    """Compile the kernels for every wheel, editable ones too. Without them the package runs on torch's kernels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tag the wheel for this platform. A failure becomes a warning."""
        if os.environ.get(PURE) == "1":
            for target in TARGETS:
                (FOLDER / f"_native_{target}.so").unlink(missing_ok=True)
            return
        problems = compile_native(FOLDER, os.environ.get("CXX", "g++"))
        for problem in problems:
            self.app.display_warning(f"native CPU kernels are left out, torch's will serve: {problem}")
        if len(problems) < len(TARGETS):
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform.system().lower()}_{platform.machine()}"


def compile_native(folder: Path, compiler: str) -> list[str]:
    """Compile the C++ files under folder/csrc into folder/_native_TARGET.so, and return a message per failed target.

    A library that cannot be rebuilt is removed, since it belongs to other sources.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = pool.map(lambda target: _compile(folder, target, compiler), TARGETS)
        return [f"{target}: {problem}" for target, problem in zip(TARGETS, problems, strict=True) if problem]


def _compile(folder: Path, target: str, compiler: str) -> str:
    library = folder / f"_native_{target}.so"
    if platform.machine() != "x86_64":
        library.unlink(missing_ok=True)
        return f"no kernels for {platform.machine()}"
    partial = library.with_suffix(".partial")
    command = [compiler, *FLAGS, *TARGETS[target].flags, f"-DINFOQUANT_ABI_VERSION={_targets.ABI_VERSION}"]
    command += ["-I", str(folder / "csrc"), "-o", str(partial)]
    command += map(str, sorted((folder / "csrc").rglob("*.cpp")))
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        problem = f"{compiler}: {error.strerror}"
    except subprocess.CalledProcessError as error:
        problem = f"{' '.join(command)} failed:\n{error.stderr}"
    else:
        partial.replace(library)
        return ""
    partial.unlink(missing_ok=True)
    library.unlink(missing_ok=True)
    return problem
