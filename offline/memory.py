"""Predict what a run holds in memory and writes to disk, before it begins.

Most stages hold one decoder layer. Three hold the whole model: sampling calibration text token by token, weighing
tokens, and distillation, whose gradients run through all layers; a layer at a time they would read the model hundreds
of times.
Memory is main memory; a GPU's is not counted.
"""

import math
from collections import Counter
from collections.abc import Mapping

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from infoquant_vllm.format import ModelShape, TensorSpec
from offline.algorithms.gptq import FACTOR_BLOCK
from offline.algorithms.head_kl import CHUNK_POSITIONS
from offline.errors import ToolError
from offline.mixture import samples_itself
from offline.model.hidden_states import TOKENS_PER_BATCH
from offline.model.scratch import goes_to_disk
from offline.model.source import Source
from offline.output.shards import plan_shards, spec_bytes
from offline.progress import held_bytes
from offline.recipe import CalibrationSize, Recipe

FLOAT32 = 4
SAMPLED_TOGETHER = 256  # rows sampled in a batch: a product of fewer takes almost as long on a CPU
ROWS_PER_DRAW = 64  # rows whose probabilities are held at once, in float32
COPIES_TO_SAMPLE = 2  # of the weights: as read, and in the model
COPIES_TO_DISTILL = 2  # of the weights: the student's and the source's
DISTILL_ACTIVATIONS = 14  # tensors of hidden size, and half as many of intermediate size, kept per layer for gradients
KL_POSITIONS = 1024  # positions whose predictions are kept to measure KL
COPIES_OF_LOGITS = 4  # logits, probabilities to draw from, and what their gradient takes
CLIP_ACTIVATIONS = 20  # tensors of hidden and of intermediate size kept for the gradients of clips
ROTATION_STEP_MATRICES = 15  # hidden x hidden float32 matrices held by a step of `learn_rotation`
BOUND_FACTOR, BOUND_BYTES = 1.5, 2 * 2**30
"""A run should stay within BOUND_FACTOR times a float32 layer and its batch of activations, plus BOUND_BYTES.

Of a mixture of experts a layer counts with one expert, and its quantized experts are added.
"""


class SitePlan(BaseModel):
    """Sizes of the linears of one layer that share an input; of the largest where layers have other formats."""

    model_config = ConfigDict(frozen=True)

    linears: list[str]
    rows: int
    columns: int
    source_bytes: int
    bytes: int
    hessian_bytes: int


class StagePlan(BaseModel):
    """Peak memory of one stage of the run."""

    model_config = ConfigDict(frozen=True)

    name: str
    memory_bytes: int


class Plan(BaseModel):
    """Sizes and memory of a run; every decoder layer has the same `sites`, those of one expert `experts` times."""

    model_config = ConfigDict(frozen=True)

    layers: int
    experts: int
    layer_float32_bytes: int
    batch_bytes: int
    hidden_states_bytes: int
    hidden_states_on_disk: bool
    sites: dict[str, SitePlan]
    stages: list[StagePlan]
    bits_per_weight: tuple[float, float] | None
    """The least and the most that a budget may choose; sizes are those of its base."""
    shards: int
    disk_bytes: int
    memory_bytes: int
    memory_bound_bytes: int


def make_plan(
    source: Source,
    recipe: Recipe,
    specs: Mapping[str, TensorSpec],
    calibration: str,
    shard_bytes: int,
    disk_bytes: int,
    bits: tuple[float, float] | None = None,
) -> Plan:
    """Plan a run that writes the tensors `specs`, `disk_bytes` in all, in shards of `shard_bytes`.

    bits: the least and most bits per weight that a budget may choose; None: the recipe is what it is
    """
    sites = {name: _site(site, source.shape, recipe, specs) for name, site in source.shape.kinds_of_sites.items()}
    layer = FLOAT32 * sum(site.rows * site.columns for site in sites.values())
    size = recipe.calibration
    tokens = size.sequences * size.sequence_length if recipe.needs_calibration else 0
    batch = _batch_bytes(source.shape, min(tokens, max(TOKENS_PER_BATCH, size.sequence_length)))
    hidden = FLOAT32 * tokens * source.shape.hidden_size if recipe.reads_layers else 0
    hidden *= 1 if source.shape.experts is None else 2  # inputs of the experts are kept beside them
    stages = _stages(source, recipe, calibration, sites, layer, batch, _in_memory(hidden))
    if bits is not None:
        needed = held_bytes() + layer + batch + sensitivity_bytes(source)
        stages.insert(-1, StagePlan(name="sensitivity", memory_bytes=needed))
    return Plan(
        layers=source.shape.num_hidden_layers,
        experts=source.shape.num_experts,
        layer_float32_bytes=layer,
        batch_bytes=batch,
        hidden_states_bytes=hidden,
        hidden_states_on_disk=goes_to_disk(hidden),
        sites=sites,
        stages=stages,
        shards=len(plan_shards(specs, shard_bytes)),
        disk_bytes=disk_bytes,
        bits_per_weight=bits,
        memory_bytes=max(stage.memory_bytes for stage in stages),
        memory_bound_bytes=int(BOUND_FACTOR * (layer + batch)) + _packed_experts(source.shape, sites) + BOUND_BYTES,
    )


def check_memory(source: Source, recipe: Recipe, calibration: str, has_budget: bool) -> None:
    """Refuse a run with a stage that holds the whole model and needs more memory than is free."""
    free = psutil.virtual_memory().available
    if has_budget and sensitivity_bytes(source) > free:
        raise ToolError(
            f"{source.folder}: a budget measures KL, which holds the whole model, about "
            f"{sensitivity_bytes(source) / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free; use a preset"
        )
    if recipe.needs_calibration and samples_itself(calibration):
        needed = _sampling_bytes(source, recipe.calibration)
        if needed > free:
            raise ToolError(
                f"{source.folder}: sampling calibration text from the model holds all of it, about "
                f"{needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free; give --calibration a text file, "
                "or a file that `infoquant sample` wrote on a larger machine"
            )
    if recipe.distillation is not None:
        needed = _distillation_bytes(source, recipe)
        if needed > free:
            raise ToolError(
                f"recipe '{recipe.name}' distills, which holds the whole model twice, about {needed / 1e9:.0f} GB, "
                f"and {free / 1e9:.0f} GB are free; use preset fast, or a recipe without `distillation`, "
                "which hold one layer at a time"
            )
    if recipe.gptq.guided:
        needed = _guiding_bytes(source, recipe.calibration)
        if needed > free:
            raise ToolError(
                f"recipe '{recipe.name}' weighs tokens by gradients, which holds the whole model, about "
                f"{needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free; use preset fast, or a recipe without "
                "`gptq.guided` and `distillation`, which hold one layer at a time"
            )


def _site(name: str, shape: ModelShape, recipe: Recipe, specs: Mapping[str, TensorSpec]) -> SitePlan:
    modules, by_layer = set(shape.sites[name]), Counter[str]()
    for key, spec in specs.items():
        layer, _, linear = key.rpartition(".")[0].removeprefix("model.layers.").partition(".")
        if linear in modules:
            by_layer[layer] += spec_bytes(spec)
    sizes = [shape.layer_linears[linear] for linear in shape.sites[name]]
    rows, columns = sum(size[0] for size in sizes), sizes[0][1]
    return SitePlan(
        linears=list(shape.sites[name]),
        rows=rows,
        columns=columns,
        source_bytes=2 * rows * columns,
        bytes=max(by_layer.values()),
        hessian_bytes=FLOAT32 * columns**2 if recipe.rounding == "gptq" else 0,
    )


def _stages(
    source: Source,
    recipe: Recipe,
    calibration: str,
    sites: dict[str, SitePlan],
    layer: int,
    batch: int,
    hidden: int,
) -> list[StagePlan]:
    """Return the stages in the order of the run; `hidden` are bytes of hidden states kept in memory."""
    shape, held = source.shape, held_bytes()
    held += _packed_experts(shape, sites)
    found = {}
    if recipe.needs_calibration and samples_itself(calibration):
        found["calibration text"] = held + _sampling_bytes(source, recipe.calibration)
    held += hidden
    if recipe.transform.startswith("psot"):
        found["rotation"] = held + _rotation_bytes(shape, recipe, layer + batch)
    found["embeddings and lm_head"] = held + _vocabulary_bytes(source, recipe)
    if recipe.gptq.guided:
        found["token weights"] = held + _guiding_bytes(source, recipe.calibration)
    if recipe.reads_layers:
        found["activations"] = held + layer + batch + sum(site.hessian_bytes for site in sites.values())
    found["weights"] = held + (layer if recipe.rounding == "none" else _rounding_bytes(list(sites.values())))
    if recipe.learned_clips is not None:
        tokens = recipe.calibration.sequence_length * recipe.learned_clips.batch_sequences
        kept = CLIP_ACTIVATIONS * FLOAT32 * tokens * (shape.hidden_size + shape.intermediate_size)
        found["clips"] = held + 2 * layer + kept
    if recipe.distillation is not None:
        found["distillation"] = held + _distillation_bytes(source, recipe)
    return [StagePlan(name=name, memory_bytes=memory) for name, memory in found.items()]


def sampling_dtype() -> torch.dtype:
    """Return the dtype in which text is sampled: bfloat16 where the CPU multiplies such matrices, else float32."""
    return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else torch.float32


def _packed_experts(shape: ModelShape, sites: dict[str, SitePlan]) -> int:
    """Return the bytes of a layer's quantized experts, which are held until the layer is written."""
    return shape.num_experts * sum(site.bytes for site in sites.values() if ".experts." in site.linears[0])


def _sampling_bytes(source: Source, size: CalibrationSize) -> int:
    """Bytes to sample calibration text: weights, keys and values, logits, and probabilities in float32."""
    shape, rows = source.shape, min(SAMPLED_TOGETHER, size.sequences)
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * rows * size.sequence_length
    values = COPIES_TO_SAMPLE * _parameters(shape) + cache + rows * shape.vocab_size
    return sampling_dtype().itemsize * values + FLOAT32 * 2 * min(rows, ROWS_PER_DRAW) * shape.vocab_size


def sensitivity_bytes(source: Source) -> int:
    """Bytes to measure what formats cost: the weights in float32, and predictions at some positions."""
    return FLOAT32 * (
        _parameters(source.shape) + (KL_POSITIONS + COPIES_OF_LOGITS * CHUNK_POSITIONS) * source.shape.vocab_size
    )


def _guiding_bytes(source: Source, size: CalibrationSize) -> int:
    """Bytes to weigh tokens: the weights in float32, activations kept for gradients, and logits with gradients."""
    shape, width = source.shape, source.shape.hidden_size + source.shape.intermediate_size // 2
    kept = DISTILL_ACTIVATIONS * width * shape.num_hidden_layers + COPIES_OF_LOGITS * shape.vocab_size
    found = len(shape.sites) * shape.num_hidden_layers * size.sequences
    return FLOAT32 * (_parameters(shape) + (kept + found) * size.sequence_length)


def _distillation_bytes(source: Source, recipe: Recipe) -> int:
    """Bytes to distill: weights of student and source in float32, and activations kept for gradients."""
    shape, size = source.shape, recipe.calibration
    rows = 0 if recipe.distillation is None else recipe.distillation.batch_sequences
    width = shape.hidden_size + shape.intermediate_size // 2
    kept = DISTILL_ACTIVATIONS * width * shape.num_hidden_layers * rows * size.sequence_length
    targets = size.sequences * size.sequence_length * shape.hidden_size
    return FLOAT32 * (COPIES_TO_DISTILL * _parameters(shape) + kept + targets)


def _parameters(shape: ModelShape) -> int:
    """Count the model's weights, norms and biases left out."""
    linears = sum(math.prod(size) for size in shape.linears().values())
    return linears + (2 - shape.tie_word_embeddings) * shape.vocab_size * shape.hidden_size


def _vocabulary_bytes(source: Source, recipe: Recipe) -> int:
    """Bytes to write embedding and lm_head: one of them as read, and rotated or in codes where the recipe does that."""
    shape = source.shape
    folds_r1 = recipe.rotates_stream and shape.folds_r1
    changes = recipe.lm_head_bits is not None or (folds_r1 and not shape.tie_word_embeddings)
    value = FLOAT32 if changes else source.dtype("model.embed_tokens.weight").itemsize
    return value * shape.vocab_size * shape.hidden_size + 4 * FLOAT32 * shape.hidden_size**2


def _rotation_bytes(shape: ModelShape, recipe: Recipe, layer_and_batch: int) -> int:
    """Bytes to learn rotations: a layer and its batch, and the activations that they are learned from."""
    if recipe.transform == "psot-shared":
        steps = ROTATION_STEP_MATRICES * FLOAT32 * shape.hidden_size**2
        pool = FLOAT32 * recipe.psot.pool_tokens * shape.hidden_size
        return _in_memory(pool) + max(layer_and_batch, steps)
    features = 3 * shape.hidden_size + shape.num_key_value_heads * shape.head_dim
    tokens = recipe.calibration.sequences * recipe.calibration.sequence_length
    return layer_and_batch + _in_memory(FLOAT32 * tokens * features)


def _rounding_bytes(sites: list[SitePlan]) -> int:
    """Peak bytes of a layer: one site's Hessian, its factor and two copies of its weights, and the sites to come."""
    peak = 0
    for index, site in enumerate(sites):
        waiting = sum(FLOAT32 * other.rows * other.columns + other.hessian_bytes for other in sites[index + 1 :])
        factor = site.hessian_bytes + site.hessian_bytes * min(FACTOR_BLOCK, site.columns) // site.columns
        peak = max(peak, waiting + site.hessian_bytes + factor + 2 * FLOAT32 * site.rows * site.columns)
    return peak


def _batch_bytes(shape: ModelShape, tokens: int) -> int:
    """Bytes of a batch's activations in one layer, float32: the inputs and outputs of its linears."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    inner = max(shape.features(site) for site in shape.sites if site.endswith("down"))
    outputs = queries + 2 * keys + 2 * shape.hidden_size + 2 * inner
    inputs = shape.hidden_size + queries + inner
    return FLOAT32 * tokens * (outputs + inputs)


def _in_memory(size: int) -> int:
    """Return `size`, or 0 for a tensor that is mapped from a file."""
    return 0 if goes_to_disk(size) else size
