"""Tensors too large to be sure of: in memory where there is room, else in a file that is mapped into it."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

MEMORY_SHARE = 0.25
"""Of the memory that is free: a tensor that would take more of it goes to disk."""
LARGEST_IN_MEMORY = 2**29
"""Bytes: a larger tensor goes to disk however much is free, and what a run holds does not hang on its length."""


@dataclass(frozen=True)
class Scratch:
    """Where such files lie; without a folder everything is kept in memory."""

    folder: Path | None = None

    def empty(self, *size: int) -> torch.Tensor:
        """A float32 tensor with anything in it. Its file has no name, so that it goes with the tensor."""
        elements = torch.Size(size).numel()
        if self.folder is None or not goes_to_disk(4 * elements):
            return torch.empty(size)
        descriptor, name = tempfile.mkstemp(dir=self.folder)
        try:
            os.posix_fallocate(descriptor, 0, 4 * elements)  # a full disk shows here, not as a crash later
            return torch.from_file(name, shared=True, size=elements).view(size)
        finally:
            os.close(descriptor)
            Path(name).unlink()


def goes_to_disk(size: int) -> bool:
    """Whether a tensor of so many bytes is too large to be kept in memory."""
    return size > min(LARGEST_IN_MEMORY, MEMORY_SHARE * psutil.virtual_memory().available)


IN_MEMORY = Scratch()
