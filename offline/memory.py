"""The two steps that hold a whole model in memory, and what they need; all others hold one decoder layer.

Text is sampled token by token, and distillation runs gradients through all layers: a layer at a time
both would read the model from disk hundreds of times.
"""

import math

import psutil

from offline.errors import ToolError
from offline.model.source import Source
from offline.recipe import CalibrationSize, Recipe

FLOAT32 = 4
SELF_BATCH = 128
"""Sequences that are sampled together."""
COPIES_TO_SAMPLE = 2
"""Of the weights: as they are read, and in the model."""
COPIES_TO_DISTIL = 2
"""Of the weights: the student's, and the source's."""
ACTIVATIONS_KEPT = 14
"""Tensors of hidden size, and half as many of intermediate size, that gradients need of a layer and its quantizers."""


def sampling_bytes(source: Source, size: CalibrationSize) -> int:
    """To sample calibration text from the model: weights, keys and values in float32, logits."""
    shape, rows = source.shape, min(SELF_BATCH, size.sequences)
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * rows * size.sequence_length
    return FLOAT32 * (COPIES_TO_SAMPLE * parameters(source) + cache + 4 * rows * shape.vocab_size)


def distillation_bytes(source: Source, recipe: Recipe) -> int:
    """To distil: the weights of student and source in float32, and what gradients need of every layer."""
    shape, size = source.shape, recipe.calibration
    rows = 0 if recipe.distillation is None else recipe.distillation.batch_sequences
    width = shape.hidden_size + shape.intermediate_size // 2
    kept = ACTIVATIONS_KEPT * width * shape.num_hidden_layers * rows * size.sequence_length
    targets = size.sequences * size.sequence_length * shape.hidden_size
    return FLOAT32 * (COPIES_TO_DISTIL * parameters(source) + kept + targets)


def parameters(source: Source) -> int:
    """How many numbers the model has."""
    shape = source.shape
    linears = sum(math.prod(size) for size in shape.linears().values())
    return linears + (2 - shape.tie_word_embeddings) * shape.vocab_size * shape.hidden_size


def check_memory(source: Source, recipe: Recipe, calibration: str) -> None:
    """Refuse a step that needs more memory than is free, before anything is computed."""
    free = psutil.virtual_memory().available
    if recipe.needs_calibration and calibration == "self":
        needed = sampling_bytes(source, recipe.calibration)
        if needed > free:
            raise ToolError(
                f"{source.folder}: sampling calibration text from the model holds all of it, about "
                f"{needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free; "
                "give --calibration a text file, or a file of `infoquant sample` made where there is room"
            )
    if recipe.distillation is not None:
        needed = distillation_bytes(source, recipe)
        if needed > free:
            raise ToolError(
                f"recipe '{recipe.name}' distils, which holds the whole model twice, about {needed / 1e9:.0f} GB, and "
                f"{free / 1e9:.0f} GB are free; take preset fast, or a recipe without `distillation`, "
                "which hold one layer at a time"
            )
