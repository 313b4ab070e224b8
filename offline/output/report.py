"""The report of a quantization run: `infoquant_report.json`."""

import math
import resource
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from infoquant_vllm.format import KVCacheArgs, ModelShape, TensorSpec, kv_bytes_per_token_head
from offline.formats import SiteName
from offline.memory import Plan
from offline.model.source import Source
from offline.output.adapter_basis import basis_bytes
from offline.output.sentence_modules import projection_bytes
from offline.output.shards import spec_bytes
from offline.recipe import Recipe

REPORT_FILE = "infoquant_report.json"
FormatWords = Annotated[str, Field(pattern=r"^[a-z0-9 ,]{1,40}$")]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ChosenSite(BaseModel):
    """Formats that a budget chose for one site of a layer, in words, and the KL that they are predicted to cost."""

    model_config = ConfigDict(frozen=True)

    weights: FormatWords
    inputs: FormatWords
    kl: Amount


class BudgetReport(BaseModel):
    """What a budget chose. KL is predicted, in nats per token, of what is rounded before distillation.

    curve: bits per weight and KL of the best choices, from the fewest bits to the most
    uniform: the same with one format of weights in all layers
    sites: by site and layer
    """

    model_config = ConfigDict(frozen=True)

    base: str
    goal: str
    kl: Amount
    base_kl: Amount
    bits_per_weight: Amount
    base_bits_per_weight: Amount
    lm_head_bits: int
    cache_bits: tuple[int, int]
    curve: list[tuple[Amount, Amount]]
    uniform: dict[FormatWords, tuple[Amount, Amount]]
    sites: dict[SiteName, list[ChosenSite]]


class Report(BaseModel):
    """Figures of one run. Sizes are bytes of tensors; a dry run has only those and its plan."""

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
    """Share of the energy of each linear's output that weight rounding loses, by module name."""
    orthogonality_errors: dict[str, float] = {}
    """Largest entry of |Q^T Q - I| over the rotations of each layer, and of R1 under "residual"."""
    expert_tokens: dict[str, list[tuple[int, int]]] = {}
    """By layer and expert: the calibration tokens that the router sent to it, and others that were dealt to it."""
    budget: BudgetReport | None = None
    """What a budget chose, None where a preset or a recipe decided."""
    seconds: dict[str, float] = {}
    """Wall time by stage."""
    plan: Plan | None = None
    """Sizes and memory, from a dry run."""
    peak_memory_bytes: int | None = None
    """Peak main memory of the process by the end of the run."""


def peak_memory_bytes() -> int:
    """Return the peak main memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux getrusage includes the parent's memory at the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def checkpoint_sizes(source: Source, recipe: Recipe, specs: dict[str, TensorSpec]) -> dict[str, Any]:
    """Compute the size fields of a `Report` for a checkpoint that holds `specs`."""
    shape, width = source.shape, source.unquantized_dtype.itemsize
    config = recipe.quantization_config(shape)
    tensors = {name: spec_bytes(spec) for name, spec in specs.items()}
    linears = shape.linears()
    linear_bytes = sum(size for name, size in tensors.items() if name.rsplit(".", 1)[0] in linears)
    weights = sum(math.prod(size) for size in linears.values())
    biases = sum(rows for module, (rows, _) in linears.items() if shape.has_bias(module))
    vocabulary = (2 - shape.tie_word_embeddings) * shape.vocab_size * shape.hidden_size
    norms = sum(shape.norms().values())
    routers = shape.num_hidden_layers * sum(math.prod(size) for size in shape.gates.values())
    return {
        "source_linear_bytes": (weights + biases) * width,
        "linear_bytes": linear_bytes,
        "source_bytes": (weights + biases + vocabulary + norms + routers) * width,
        "total_bytes": sum(tensors.values()) + projection_bytes(source, config) + basis_bytes(recipe, shape),
        "bits_per_weight": 8 * linear_bytes / weights,
        "source_kv_bytes_per_token": kv_bytes_per_token(shape, None, width),
        "kv_bytes_per_token": kv_bytes_per_token(shape, config.kv_cache, width),
    }


def kv_bytes_per_token(shape: ModelShape, cache: KVCacheArgs | None, itemsize: int) -> int:
    """Return the KV cache's bytes per token; `itemsize` is that of an unquantized cache."""
    heads = shape.num_hidden_layers * shape.num_key_value_heads
    if cache is None:
        return heads * 2 * shape.head_dim * itemsize
    return heads * kv_bytes_per_token_head(shape.head_dim, cache.num_bits)
