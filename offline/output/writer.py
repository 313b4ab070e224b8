"""Writing a checkpoint folder so that nobody ever sees half of one."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from infoquant_vllm.format import QUANT_METHOD, FormatError, TensorSpec, check_values, read_json
from offline.errors import ToolError
from offline.output.copied_files import copy_files
from offline.output.shards import ShardWriter
from offline.output.work import fsync


class Writer:
    """Collects a checkpoint in a folder of its own; tensors go to disk as they come."""

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], shard_bytes: int):
        """`specs`: of every tensor, in the order of the shards, each with its dtype."""
        self.folder = folder
        self._shards = ShardWriter(folder, specs, shard_bytes)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors by their full names; raises ToolError for values that nothing could serve."""
        for name, tensor in tensors.items():
            try:
                check_values(tensor, name, "not written")
            except FormatError as error:
                raise ToolError(f"{error}; check the source with `infoquant eval`, or take another recipe") from None
            self._shards.write(name, tensor)

    def copy_from(self, source: Path) -> None:
        """Copy what the checkpoint keeps of the source's files; see `copied_files`."""
        copy_files(source, self.folder)

    def write_text(self, name: str, text: str) -> None:
        """Write one text file."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def finish(self, config: dict[str, Any]) -> None:
        """Write the index, force all to disk, config.json after all else: without it nothing loads the folder."""
        self._shards.finish()
        for file in self.folder.rglob("*"):
            fsync(file)
        self.write_text("config.json", json.dumps(config, indent=2) + "\n")
        fsync(self.folder / "config.json")
        fsync(self.folder)


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


def check_writable(output: Path) -> None:
    """Make the folder that `output` is to lie in; refuse one that takes no files, before time goes into them."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{output.name}.partial-", dir=output.parent):
            pass
    except OSError as error:
        raise ToolError(f"{output}: cannot be written ({error.strerror or error}); choose another place") from None


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
        move_into_place(partial, output)
    except (OSError, SafetensorError) as error:
        raise not_written(output, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def not_written(output: Path, error: Exception, advice: str = "") -> ToolError:
    """What to tell where the disk did not take it."""
    free = shutil.disk_usage(output.parent).free
    return ToolError(f"{output}: not written, nothing was changed: {error} ({free / 1e6:.0f} MB are free){advice}")


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
        with suppress(OSError):  # where nothing could be made there is nothing to remove
            partial.unlink(missing_ok=True)


def move_into_place(partial: Path, output: Path) -> None:
    """Let a finished folder take the place of `output`, which may hold an older one."""
    if output.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
        output.rename(old / output.name)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)
    fsync(output.parent)


def _is_checkpoint(folder: Path) -> bool:
    try:
        found = read_json(folder / "config.json").get("quantization_config")
    except FormatError:
        return False
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
