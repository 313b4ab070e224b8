"""What a quantization run tells about itself: `infoquant_report.json`."""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from infoquant_vllm.format import QuantizationConfigData, TensorSpec, kv_bytes_per_token_head
from offline.memory import Plan
from offline.model.source import Source
from offline.output.sentence_modules import projection_bytes
from offline.output.shards import spec_bytes

REPORT_FILE = "infoquant_report.json"


class Report(BaseModel):
    """Figures of one run. Sizes are bytes of tensors; a dry run knows nothing else."""

    model_config = ConfigDict(frozen=True)

    source: str
    recipe: str
    calibration: str
    seed: int
    dry_run: bool
    source_linear_bytes: int
    linear_bytes: int
    source_bytes: int
    total_bytes: int
    bits_per_weight: float
    source_kv_bytes_per_token: int
    kv_bytes_per_token: int
    calibration_tokens: int = 0
    calibration_sha256: str | None = None
    errors: dict[str, float] = {}
    """Share of each linear's output energy that weight rounding loses, by module name."""
    orthogonality_errors: dict[str, float] = {}
    """Largest entry of |Q^T Q - I| over each layer's rotations, and over that of the residual stream."""
    seconds: dict[str, float] = {}
    """Wall time by stage."""
    plan: Plan | None = None
    """Of a dry run."""
    peak_memory_bytes: int | None = None
    """The most main memory that the process held until the run's end."""


class Stopwatch:
    """Sums up wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the block's time to `stage`."""
        began = time.monotonic()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - began, 2)


def peak_memory_bytes() -> int:
    """The most main memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, whose getrusage counts what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def checkpoint_sizes(source: Source, config: QuantizationConfigData, specs: dict[str, TensorSpec]) -> dict[str, Any]:
    """The size fields of a `Report` on a checkpoint that holds `specs`."""
    shape, width = source.shape, source.unquantized_dtype.itemsize
    tensors = {name: spec_bytes(spec) for name, spec in specs.items()}
    linears = shape.linears()
    linear_bytes = sum(size for name, size in tensors.items() if name.rsplit(".", 1)[0] in linears)
    weights = sum(math.prod(size) for size in linears.values())
    biases = sum(rows for module, (rows, _) in linears.items() if shape.has_bias(module))
    ends = (2 - shape.tie_word_embeddings) * shape.vocab_size * shape.hidden_size
    norms = sum(shape.norms().values())
    cached = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    quantized = cached * width
    if config.kv_cache is not None:
        heads = shape.num_hidden_layers * shape.num_key_value_heads
        quantized = heads * kv_bytes_per_token_head(shape.head_dim, config.kv_cache.num_bits)
    return {
        "source_linear_bytes": (weights + biases) * width,
        "linear_bytes": linear_bytes,
        "source_bytes": (weights + biases + ends + norms) * width,
        "total_bytes": sum(tensors.values()) + projection_bytes(source, config),
        "bits_per_weight": 8 * linear_bytes / weights,
        "source_kv_bytes_per_token": cached * width,
        "kv_bytes_per_token": quantized,
    }
