"""Memory-mapped offload: allocate large tensors in memory if there is room, else in a mapped file."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

MEMORY_SHARE = 0.25
"""Largest share of the free memory for one tensor; larger tensors go to disk."""
LARGEST_IN_MEMORY = 2**29
"""Bytes; larger tensors go to disk even if memory is free, so that peak memory does not depend on the text's length."""


@dataclass(frozen=True)
class Scratch:
    """Folder of the mapped files; None keeps everything in memory."""

    folder: Path | None = None

    def empty(self, *size: int) -> torch.Tensor:
        """Allocate an uninitialized float32 tensor. Its file has no name, so that it is freed with the tensor."""
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
    """Return whether a tensor of `size` bytes is too large to be kept in memory."""
    return size > min(LARGEST_IN_MEMORY, MEMORY_SHARE * psutil.virtual_memory().available)


IN_MEMORY = Scratch()
