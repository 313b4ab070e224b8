"""Keep what finished steps of a run leave for later ones: safetensors files in a folder."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from infoquant_vllm.format import TensorSpec
from offline.model.scratch import Scratch
from offline.output.atomic import fsync
from offline.output.shards import NAMES, begin_file, raw_bytes


class Store:
    """Named entries, each a set of tensors and JSON metadata; an entry that exists is whole, however the run ended.

    persistent: the folder outlives the run, so that steps save what another run can resume from
    """

    def __init__(self, folder: Path, persistent: bool = False):
        folder.mkdir(exist_ok=True)
        self.folder, self.persistent, self.scratch = folder, persistent, Scratch(folder)

    def save(self, name: str, tensors: dict[str, torch.Tensor], **metadata: Any) -> None:
        """Save an entry, in place of an older one; copies no tensor that is contiguous and in main memory."""
        partial = self.folder / f"{name}.partial"
        specs = {key: TensorSpec(shape=tuple(t.shape), dtype=NAMES[t.dtype]) for key, t in tensors.items()}
        offsets = begin_file(partial, specs, {"entry": json.dumps(metadata)})
        with partial.open("r+b") as opened:
            for key, tensor in tensors.items():
                opened.seek(offsets[key])
                opened.write(raw_bytes(tensor))
            opened.flush()
            if self.persistent:
                os.fsync(opened.fileno())
        partial.replace(self._file(name))
        if self.persistent:
            fsync(self.folder)

    def exists(self, name: str) -> bool:
        """Return whether an entry was saved."""
        return self._file(name).is_file()

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Load the tensors of an entry."""
        with safe_open(self._file(name), framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)

    def metadata(self, name: str) -> dict[str, Any]:
        """Load the metadata of an entry."""
        with safe_open(self._file(name), framework="pt") as opened:
            metadata: dict[str, Any] = json.loads(opened.metadata()["entry"])
        return metadata

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
