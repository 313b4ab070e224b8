"""What finished steps of a run leave for later ones: safetensors files in a folder of its own."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from infoquant_vllm.format import TensorSpec
from offline.model.scratch import Scratch
from offline.output.shards import NAMES, begin_file, raw_bytes


class Work:
    """Named sets of tensors, each with facts that JSON can hold; what is there is whole, whatever ended the run.

    keeps: whether the folder outlives the run, so that steps should leave what another run can go on from
    """

    def __init__(self, folder: Path, keeps: bool = False):
        folder.mkdir(exist_ok=True)
        self.folder, self.keeps, self.scratch = folder, keeps, Scratch(folder)

    def save(self, name: str, tensors: dict[str, torch.Tensor], **facts: Any) -> None:
        """Put `tensors` and `facts` under `name`, in place of what was there."""
        partial = self.folder / f"{name}.partial"
        specs = {key: TensorSpec(shape=tuple(t.shape), dtype=NAMES[t.dtype]) for key, t in tensors.items()}
        offsets = begin_file(partial, specs, {"facts": json.dumps(facts)})
        with partial.open("r+b") as opened:
            for key, tensor in tensors.items():
                opened.seek(offsets[key])
                opened.write(raw_bytes(tensor))
            opened.flush()
            if self.keeps:
                os.fsync(opened.fileno())
        partial.replace(self._file(name))
        if self.keeps:
            fsync(self.folder)

    def holds(self, name: str) -> bool:
        """Whether anything was saved under `name`."""
        return self._file(name).is_file()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors saved under `name`."""
        with safe_open(self._file(name), framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a dict)

    def facts(self, name: str) -> dict[str, Any]:
        """The facts saved under `name`."""
        with safe_open(self._file(name), framework="pt") as opened:
            facts: dict[str, Any] = json.loads(opened.metadata()["facts"])
        return facts

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
