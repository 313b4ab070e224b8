"""What decides a run's bytes, in short: two runs with equal fingerprints write the same checkpoint."""

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch

from offline.model.source import TOKENIZER_FILES, Source
from offline.recipe import Recipe

BLOCK = 2**16
HASHED_BYTES = 2**28
"""Of a file at most: larger ones are hashed in evenly spaced blocks, their first and last among them."""
PACKAGES = ("infoquant-vllm", "torch", "transformers", "safetensors")


def fingerprint(
    source: Source, recipe: Recipe, calibration: str, seed: int, device: torch.device
) -> dict[str, str | dict[str, str]]:
    """By what a user would call it: a value to compare, or several by name."""
    folder = source.folder
    shards = {name: hash_file(folder / name) for name in sorted(set(source.weight_map.values()))}
    tokenizer = {name: hash_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    text = {"name": calibration}
    if Path(calibration).is_file():
        text["content"] = hash_file(Path(calibration))
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


def differences(old: dict[str, str | dict[str, str]], new: dict[str, str | dict[str, str]]) -> list[str]:
    """What a user must set back, one line each."""
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
    """SHA-256 of a file's size and content; of a large one, of as many blocks as make up HASHED_BYTES."""
    size = file.stat().st_size
    blocks = -(-size // BLOCK)
    stride = max(1, -(-blocks // (HASHED_BYTES // BLOCK)))
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for block in sorted({*range(0, blocks, stride), *range(max(0, blocks - 1), blocks)}):
            opened.seek(block * BLOCK)
            digest.update(opened.read(BLOCK))
    return digest.hexdigest()[:16]
