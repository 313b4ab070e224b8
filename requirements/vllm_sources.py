"""Unpack the Python sources of the vLLM releases in vllm-sources.txt, one folder each; nothing of them is installed."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PINS = Path(__file__).with_name("vllm-sources.txt")
PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]


def main(target: Path) -> None:
    """Fill `target`/VERSION/vllm for every pinned release."""
    for pin in (line for line in PINS.read_text().splitlines() if line and not line.startswith("#")):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*PIP, "--only-binary", ":all:", "--dest", folder, pin], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as opened:
                members = [name for name in opened.namelist() if name.startswith("vllm/") and name.endswith(".py")]
                opened.extractall(target / pin.split("==")[1], members)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
