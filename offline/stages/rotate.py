"""Choose or learn a model's rotations."""

import torch

from offline.algorithms.rotations import Transforms, random_hadamard, random_head_rotations
from offline.run import Run
from offline.stages.rotate_per_layer import learn_layer_rotations
from offline.stages.rotate_shared import collect_inputs, learn_rotation


def make_transforms(run: Run, tokens: torch.Tensor | None) -> Transforms | None:
    """Return the rotations that the recipe asks for; None for transform `none`.

    tokens: calibration tokens [sequences, length]; None where the recipe needs none
    """
    if run.recipe.transform == "none":
        return None
    generator = torch.Generator().manual_seed(run.seed)
    if run.recipe.transform == "heads":
        return Transforms(None, random_head_rotations(run.source.shape, generator))
    if run.recipe.transform == "psot-layer" and tokens is not None:
        return learn_layer_rotations(run, tokens, generator)
    shape = run.source.shape
    residual = random_hadamard(shape.hidden_size, generator) if shape.folds_r1 else None
    heads = random_head_rotations(run.source.shape, generator)
    if run.recipe.transform == "psot-shared" and tokens is not None and residual is not None:
        residual = learn_rotation(run, collect_inputs(run, tokens), residual, generator)
    return Transforms(residual, heads)
