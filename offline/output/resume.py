"""Resume an interrupted run: the folder beside its output, and the fingerprint of what decides its bytes."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from infoquant_vllm.format import read_json
from offline.errors import ToolError
from offline.mixture import parse_mixture
from offline.model.source import TOKENIZER_FILES, Source
from offline.output.atomic import fsync, not_written, replace_folder
from offline.recipe import Recipe

FINGERPRINT_FILE = "fingerprint.json"
DONE = "done"
BLOCK = 2**16
HASHED_BYTES = 2**28
"""Bytes hashed of one file at most; of larger files evenly spaced blocks, the first and the last among them."""
PACKAGES = ("infoquant-vllm", "torch", "transformers", "safetensors")

Fingerprint = dict[str, str | dict[str, str]]
"""Inputs that decide a run's bytes, by the names users know them by; equal fingerprints give equal checkpoints."""


def resume_folder(output: Path) -> Path:
    """Return the folder that keeps the state of a run that writes `output`."""
    return output.with_name(f"{output.name}.resume")


def finished_before(output: Path, fingerprint: Fingerprint) -> bool:
    """Return whether an equal run moved its output into place and was killed before it removed its folder.

    The folder is removed then.
    """
    folder = resume_folder(output)
    if not (folder / DONE).is_file() or (folder / "partial").exists() or not output.is_dir():
        return False
    same = not differences(read_json(folder / FINGERPRINT_FILE), fingerprint)
    shutil.rmtree(folder)
    return same


@contextmanager
def resumable_folder(output: Path, fingerprint: Fingerprint) -> Iterator[Path]:
    """Yield a folder that takes the place of `output` when the block succeeds.

    However else the block ends, the resume folder keeps the saved steps. Raises ToolError where that folder
    has another fingerprint, or another run uses it.
    """
    folder = resume_folder(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            _lock(lock, folder)
            _check_fingerprint(folder, fingerprint)
            partial = folder / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            (folder / DONE).unlink(missing_ok=True)
            partial.mkdir()
            yield partial
            (folder / DONE).touch()
            fsync(folder)
            replace_folder(partial, output)
            shutil.rmtree(folder)
    except (OSError, SafetensorError) as error:
        raise not_written(
            output, error, f"; fix that and continue with --resume, {folder} keeps finished steps"
        ) from error
    except BaseException as error:
        error.add_note(f"{folder} keeps finished steps; run the same command with --resume to continue")
        raise


def fingerprint(source: Source, recipe: Recipe, calibration: str, seed: int, device: torch.device) -> Fingerprint:
    """Compute the fingerprint of a run on this machine."""
    folder = source.folder
    shards = {name: hash_file(folder / name) for name in sorted(set(source.weight_map.values()))}
    tokenizer = {name: hash_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    text = {"name": calibration}
    files = [Path(part.spec) for part in parse_mixture(calibration) if Path(part.spec).is_file()]
    text |= {f"content of {file}": hash_file(file) for file in files}
    return {
        "model": {"config.json": hash_file(folder / "config.json")} | tokenizer | shards,
        "recipe": {name: str(value) for name, value in recipe.model_dump(mode="json").items()},
        "calibration": text,
        "seed": str(seed),
        "device": device.type,
        "versions": {package: version(package) for package in PACKAGES},
        "processor": {
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads (OMP_NUM_THREADS)": str(torch.get_num_threads()),
        },
    }


def differences(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return what a user must restore to resume, one line each."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name, {}), new.get(name, {})
        if isinstance(before, str) or isinstance(now, str):
            found += [f"{name} was {before}, is {now}"] if before != now else []
            continue
        for part in sorted(before.keys() | now.keys()):
            if before.get(part) != now.get(part):
                found.append(f"{name}: {part} was {before.get(part)}, is {now.get(part)}")
    return found


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file's size and content; of a large file, of HASHED_BYTES in evenly spaced blocks."""
    size = file.stat().st_size
    blocks = -(-size // BLOCK)
    stride = max(1, -(-blocks // (HASHED_BYTES // BLOCK)))
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for block in sorted({*range(0, blocks, stride), *range(max(0, blocks - 1), blocks)}):
            opened.seek(block * BLOCK)
            digest.update(opened.read(BLOCK))
    return digest.hexdigest()[:16]


def _lock(file: Any, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ToolError(f"{folder}: another run uses it; wait for that run, or choose another output") from None


def _check_fingerprint(folder: Path, fingerprint: Fingerprint) -> None:
    """Compare the folder's fingerprint; write it where the run is new."""
    file = folder / FINGERPRINT_FILE
    if file.is_file():
        changed = differences(read_json(file), fingerprint)
        if changed:
            raise ToolError(
                f"{folder}: belongs to a different run: {'; '.join(changed)}; "
                "restore that to resume, or remove the folder to start over"
            )
        return
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(fingerprint, indent=2), encoding="utf-8")
    fsync(partial)
    partial.replace(file)
    fsync(folder)
