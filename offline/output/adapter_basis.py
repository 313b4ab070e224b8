"""Write and check what was folded into the linears, for LoRA adapters (see infoquant_vllm.format.adapter_basis)."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from infoquant_vllm.format import (
    ARCHITECTURES,
    BASIS_CONFIG,
    BASIS_FOLDER,
    BASIS_WEIGHTS,
    DOWN_SCALE,
    KEY_SCALE,
    R1,
    R2,
    AdapterBasis,
    Checkpoint,
    ModelShape,
    layer_specs,
    read_basis,
)
from offline.algorithms.rotations import Transforms, orthogonality_error
from offline.errors import CheckError
from offline.model.source import Source
from offline.recipe import Recipe

FLOAT32 = 4
LARGEST_ORTHOGONALITY_ERROR = 1e-4
SCALES = (KEY_SCALE, DOWN_SCALE)


def basis_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Return the size of the basis that a run of the recipe writes; 0 for mixtures of experts, which have none."""
    if shape.experts is not None:
        return 0
    layer = sum(math.prod(layer_specs(shape)[name].shape) for name in _folded(recipe, shape))
    config = recipe.quantization_config(shape)
    has_r1 = config.rotated_hidden_states and not config.online_r1
    return FLOAT32 * (shape.num_hidden_layers * layer + has_r1 * shape.hidden_size**2)


def write_basis(
    folder: Path, source: Source, recipe: Recipe, transforms: Transforms | None, scales: Mapping[str, torch.Tensor]
) -> None:
    """Write the basis of a checkpoint's adapters into its folder.

    scales: of equalization, by their names in the basis
    """
    shape = source.shape
    if shape.experts is not None:
        return
    found: dict[str, torch.Tensor] = {}
    for layer in range(shape.num_hidden_layers):
        for name in _folded(recipe, shape):
            full = f"model.layers.{layer}.{name}"
            if name == R2:
                assert transforms is not None  # the recipe rotates values
                assert transforms.heads is not None
                found[full] = transforms.heads[layer]
            else:
                found[full] = scales[full] if name in SCALES else source.tensor(full)
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in found.items()}
    residual = None if transforms is None else transforms.residual
    whole = tensors if residual is None else tensors | {R1: residual.float().contiguous()}
    (folder / BASIS_FOLDER).mkdir()
    config = {"fingerprint": AdapterBasis(whole).fingerprint()}
    (folder / BASIS_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    has_r1_elsewhere = recipe.quantization_config(shape).online_r1
    content = save(tensors if has_r1_elsewhere else whole, metadata={"format": "pt"})
    (folder / BASIS_WEIGHTS).write_bytes(content)  # save_file would let no other user read it


def check_basis(checkpoint: Checkpoint) -> str:
    """Check the fingerprint of a checkpoint's basis and its rotations; FormatError or CheckError for what is wrong."""
    basis = read_basis(checkpoint)
    if basis is None:
        return f"no {BASIS_CONFIG}, so LoRA adapters cannot be served"
    worst = 0.0
    for name, tensor in basis.tensors.items():
        if name.rpartition(".")[2] in (R1, R2.rpartition(".")[2]):
            error = orthogonality_error(tensor.double())
            worst = max(worst, error)
            if error > LARGEST_ORTHOGONALITY_ERROR:
                raise CheckError(
                    f"{BASIS_WEIGHTS}: {name}: |Q^T Q - I| is {error:.2g}, at most {LARGEST_ORTHOGONALITY_ERROR:g}"
                )
    return f"basis {basis.fingerprint()}, |Q^T Q - I| of its rotations {worst:.1e}"


def _folded(recipe: Recipe, shape: ModelShape) -> list[str]:
    """Return the tensors that each layer of the basis has."""
    names = [] if recipe.transform in ("none", "heads") else [f"{norm}.weight" for norm in _norms(shape)]
    names += [] if recipe.transform == "none" else [R2]
    if recipe.equalize:
        has_norms = ARCHITECTURES[shape.architecture].qk_norm != "none"  # their gains took the scales
        names += [DOWN_SCALE] if has_norms else [KEY_SCALE, DOWN_SCALE]
    return names


def _norms(shape: ModelShape) -> list[str]:
    return sorted(set(shape.norm_of.values()))
