"""A run without an output, for tests of single stages."""

from pathlib import Path
from tempfile import mkdtemp

import torch

from offline.model.source import Source
from offline.output.store import Store
from offline.progress import ProgressReport, silent
from offline.recipe import Recipe
from offline.run import Run


def run_of(source: Source, recipe: Recipe, seed: int = 1, progress: ProgressReport = silent) -> Run:
    """Return a run on the CPU whose store lies beside the source."""
    store = Store(Path(mkdtemp(dir=source.folder.parent)))
    config = recipe.quantization_config(source.shape)
    return Run(source, recipe, config, seed, [torch.device("cpu")], progress, store)
