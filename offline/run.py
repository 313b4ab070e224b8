"""The state of one run: its inputs, which every stage reads, and the figures that stages add."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from infoquant_vllm.format import QuantizationConfigData
from offline.model.source import Source
from offline.output.store import Store
from offline.progress import JsonLog, ProgressReport
from offline.recipe import Recipe


class Stopwatch:
    """Sum up wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the block's time to `stage`."""
        began = time.monotonic()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - began, 2)


@dataclass
class Run:
    """Inputs, services and figures of a run.

    devices: the first computes everything; all of them run batches of the calibration text
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
    expert_tokens: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By layer and expert: the tokens that the router sent to it, and those that were dealt to it."""
