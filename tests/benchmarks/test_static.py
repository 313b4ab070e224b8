"""The tests of benchmarks.static, in a process whose Triton compiles: in this one it may interpret."""

import os
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "common" / "compiled_static.py"


def test_what_is_said_of_gpu_kernels_without_a_gpu(triton_cache: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", FILE],
        cwd=FILE.parents[1],
        env=environment | {"TRITON_CACHE_DIR": str(triton_cache)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
