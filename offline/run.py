"""One run of the tool: what its stages read, and what they leave for the report."""

from dataclasses import dataclass, field

import torch

from infoquant_vllm.format import QuantizationConfigData
from offline.model.source import Source
from offline.output.report import Stopwatch
from offline.output.store import Store
from offline.progress import JsonLog, ProgressReport
from offline.recipe import Recipe


@dataclass
class Run:
    """What every stage of one run reads, and the timings and errors that they leave.

    devices: the first holds what is computed, all of them run batches of the calibration text
    """

    source: Source
    recipe: Recipe
    config: QuantizationConfigData
    seed: int
    devices: list[torch.device]
    progress: ProgressReport
    store: Store
    log: JsonLog | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    errors: dict[str, float] = field(default_factory=dict)
    orthogonality_errors: dict[str, float] = field(default_factory=dict)
