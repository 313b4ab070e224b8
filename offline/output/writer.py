"""Write a checkpoint folder: shards, index, records, and config.json last."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from infoquant_vllm.format import FormatError, TensorSpec, check_values, is_checkpoint
from offline.errors import ToolError
from offline.output.atomic import fsync
from offline.output.shards import ShardWriter


class Writer:
    """Write one checkpoint into `folder`; tensors go to disk as they come."""

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], shard_bytes: int, norm_offset: int):
        """`specs`: every tensor with its dtype, in the order of the shards; norm_offset: see `check_values`."""
        self.folder, self._norm_offset = folder, norm_offset
        self._shards = ShardWriter(folder, specs, shard_bytes)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors by their full names; raise ToolError for values that cannot be served."""
        for name, tensor in tensors.items():
            try:
                check_values(tensor, name, "not written", norm_offset=self._norm_offset)
            except FormatError as error:
                raise ToolError(f"{error}; check the source with `infoquant eval`, or use another recipe") from None
            self._shards.write(name, tensor)

    def write_text(self, name: str, text: str) -> None:
        """Write one text file."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def finish(self, config: dict[str, Any]) -> None:
        """Write the index, force all to disk, then write config.json: without it nothing loads the folder."""
        self._shards.finish()
        for file in self.folder.rglob("*"):
            fsync(file)
        self.write_text("config.json", json.dumps(config, indent=2) + "\n")
        fsync(self.folder / "config.json")
        fsync(self.folder)


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output that exists; with `overwrite` replace nothing but a checkpoint of this tool."""
    if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
        raise ToolError(f"{output}: would take the place of the source {source}; choose another folder")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise ToolError(f"{output}: exists already; choose another folder, or pass --overwrite to replace it")
    if not output.is_dir() or output.is_symlink() or (any(output.iterdir()) and not is_checkpoint(output)):
        raise ToolError(f"{output}: not a checkpoint of this tool, so --overwrite does not replace it")


def check_space(output: Path, needed: int) -> None:
    """Refuse a disk with fewer than `needed` bytes free, before an hour is spent."""
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ToolError(f"{output}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free on its disk")
