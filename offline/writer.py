"""Writing a checkpoint folder so that nobody ever sees half of one."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from infoquant_vllm.format import INDEX_FILE, QUANT_METHOD, FormatError, read_json
from offline.errors import ToolError

SHARD_BYTES = 4 * 2**30
COPIED_PATTERNS = ("tokenizer*", "*.jinja", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.json")  # fmt: skip


class Writer:
    """Collects a checkpoint in a folder of its own; tensors go to disk shard by shard."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take tensors by their full names; full shards are written at once."""
        for name, tensor in tensors.items():
            if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
                self._flush()
            self._pending[name] = tensor.detach().cpu().contiguous()
            self._pending_bytes += tensor.nbytes

    def copy_from(self, source: Path) -> None:
        """Copy tokenizer files and generation config."""
        for pattern in COPIED_PATTERNS:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, self.folder / file.name)

    def write_text(self, name: str, text: str) -> None:
        """Write one text file."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def finish_tensors(self) -> None:
        """Write the last shard and the index."""
        self._flush()
        weight_map: dict[str, str] = {}
        count = len(self._shards)
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / _shard_name(number)).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_text(INDEX_FILE, json.dumps(index, indent=2) + "\n")

    def finish(self, config: dict[str, Any]) -> None:
        """Force everything to disk, config.json after all else: without it nothing loads the folder."""
        for file in self.folder.iterdir():
            _fsync(file)
        self.write_text("config.json", json.dumps(config, indent=2) + "\n")
        _fsync(self.folder / "config.json")
        _fsync(self.folder)

    def _flush(self) -> None:
        if not self._pending:
            return
        self._shards.append(list(self._pending))
        file = self.folder / _shard_name(len(self._shards))
        save_file(self._pending, file, metadata={"format": "pt"})
        file.chmod(0o666 & ~_umask())  # safetensors lets nobody but the owner read
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output that exists, and with `overwrite` whatever this tool has not written."""
    if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
        raise ToolError(f"{output}: the output would take the place of the source {source}; choose another folder")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise ToolError(f"{output}: exists already; choose another folder, or pass --overwrite to replace it")
    if not output.is_dir() or output.is_symlink() or (any(output.iterdir()) and not _is_checkpoint(output)):
        raise ToolError(f"{output}: holds something else than a checkpoint of this tool, which is not overwritten")


def check_space(output: Path, needed: int) -> None:
    """Refuse a disk that has fewer than `needed` bytes free, before an hour is spent on what it cannot take."""
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ToolError(f"{output}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free there")


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends well and vanishes when not.

    What was at `output` before stays until then. Raises ToolError where the disk does not take it.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise ToolError(f"{output}: cannot be written ({error})") from None
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        _replace(partial, output)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(output.parent).free
        raise ToolError(
            f"{output}: not written, nothing was changed: {error} ({free / 1e6:.0f} MB are free)"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(output: Path) -> Iterator[Path]:
    """A path beside `output` for the block to write; the file takes its place when the block ends well.

    Raises ToolError where the disk does not take it.
    """
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(output)
    except (OSError, SafetensorError) as error:
        raise ToolError(f"{output}: cannot be written ({error})") from None
    finally:
        partial.unlink(missing_ok=True)


def _replace(partial: Path, output: Path) -> None:
    if output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
        output.rename(old / output.name)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)
    _fsync(output.parent)


def _is_checkpoint(folder: Path) -> bool:
    try:
        found = read_json(folder / "config.json").get("quantization_config")
    except FormatError:
        return False
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def _shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
