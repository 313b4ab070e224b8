"""Read the small files beside a checkpoint's weights, from a folder or through whatever fetches files by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from infoquant_vllm.format.errors import FormatError

AGAIN = "quantize or copy the model again"

ReadFile = Callable[[str], bytes | None]
"""Return the content of a file of the checkpoint by its name, or None if it does not exist."""


def files_of(folder: Path) -> ReadFile:
    """Return a reader of a local folder's files."""
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


def parse_json(content: bytes, file: str, max_bytes: int) -> Any:
    """Return what the content of a JSON file says; FormatError, naming the file, if it is long or no JSON."""
    if len(content) > max_bytes:
        raise FormatError(f"{file}: {len(content)} bytes, expected at most {max_bytes}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: not readable as JSON ({error}); {AGAIN}") from None


def load_tensors(read: ReadFile, name: str, source: str, named_by: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name; FormatError if it is missing though `named_by` is there."""
    content = read(name)
    if content is None:
        raise FormatError(f"{source}/{name}: no such file, but {named_by}; {AGAIN}")
    try:
        return load(content)
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"{source}/{name}: not a whole safetensors file ({error}); {AGAIN}") from None
