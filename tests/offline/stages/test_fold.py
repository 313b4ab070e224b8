"""A model that is transformed but not quantized computes what its source computes."""

from pathlib import Path

import pytest
import torch

from offline.algorithms.rotations import Transforms, transform_input, undo_in_weights
from offline.model.architectures import CausalLM
from offline.model.reference import load_reference
from offline.model.source import Source
from offline.recipe import Psot, PsotLayer, Recipe
from offline.stages.fold import fold_embeddings, fold_expert, fold_layer
from offline.stages.rotate import make_transforms
from tests.common.runs import run_of
from tests.common.tiny import SIZES, VOCAB_SIZE, write_source

TRANSFORMS = ("none", "hadamard", "psot-shared", "psot-layer")
LARGEST_RELATIVE_ERROR = 1e-4


def recipe_for(transform: str) -> Recipe:
    return Recipe(
        name="test",
        transform=transform,
        rounding="gptq",
        psot=Psot(steps=5, learning_rate=0.05),
        psot_layer=PsotLayer(epochs=2, blocks=4),
    )


def transformed_model(source: Source, transforms: Transforms | None, recipe: Recipe) -> CausalLM:
    """The source with `transforms` folded in, and with hooks that do what the server does at run time."""
    model = source.model(torch.float32)
    folded = dict(fold_embeddings(source, transforms))
    model.model.norm.weight.data = folded["model.norm.weight"].float()
    for number, layer in enumerate(model.model.layers):
        state = fold_layer(source, number, transforms)
        for expert in range(source.shape.num_experts):
            state |= fold_expert(source, number, expert, transforms)
        layer.load_state_dict(state)
        inputs = transforms.inputs[number] if transforms is not None and transforms.inputs else {}
        for site, linears in source.shape.sites.items():
            online = recipe.input_transform(site, source.shape), inputs.get(site.rpartition(".")[2], {})
            for linear in map(layer.get_submodule, linears):
                linear.weight.data = undo_in_weights(linear.weight.data, *online)
                linear.register_forward_pre_hook(
                    lambda _, args, online=online: (
                        transform_input(args[0].flatten(0, -2), *online).view(args[0].shape),
                    )
                )
    if transforms is None or transforms.residual is None:
        return model
    if not source.shape.tie_word_embeddings:
        model.model.embed_tokens.weight.data = folded["model.embed_tokens.weight"].float()
        model.lm_head.weight.data = folded["lm_head.weight"].float()
        return model
    rotation = folded["model.embed_tokens.r1"]
    gain = folded["model.embed_tokens.final_norm_weight"]
    model.model.embed_tokens.register_forward_hook(lambda _, __, rows: rows @ rotation)
    model.lm_head.register_forward_pre_hook(lambda _, args: ((args[0] @ rotation.T) * gain,))
    return model


def transforms_for(source: Source, recipe: Recipe, tokens: torch.Tensor) -> Transforms | None:
    return make_transforms(run_of(source, recipe), tokens)


@torch.no_grad()
def relative_error(source: Source, transforms: Transforms | None, recipe: Recipe, tokens: torch.Tensor) -> float:
    expected = load_reference(source.folder, torch.float32)(tokens).logits
    found = transformed_model(source, transforms, recipe)(tokens).logits
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformed_model_gives_the_sources_logits(tmp_path: Path, transform: str, size: str) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    if transform == "psot-layer" and source.shape.experts is not None:
        pytest.skip("refused by the recipe")
    tokens = torch.randint(3, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(2))
    recipe = recipe_for(transform)
    assert relative_error(source, transforms_for(source, recipe, tokens), recipe, tokens) < LARGEST_RELATIVE_ERROR


def test_rotation_that_is_not_folded_everywhere_changes_the_logits(tmp_path: Path) -> None:
    source = Source.open(write_source(tmp_path / "source"))
    tokens = torch.randint(3, VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(2))
    recipe = recipe_for("hadamard")
    transforms = transforms_for(source, recipe, tokens)
    assert transforms is not None
    assert transforms.heads is not None
    heads = transforms.heads.clone()
    heads[0, 0, 0] *= 1.01
    assert relative_error(source, Transforms(transforms.residual, heads), recipe, tokens) > LARGEST_RELATIVE_ERROR


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformed_smollm2_gives_the_sources_logits(smollm2: Path, transform: str) -> None:
    source = Source.open(smollm2)
    tokens = torch.randint(3, source.shape.vocab_size, (1, 64), generator=torch.Generator().manual_seed(2))
    recipe = recipe_for(transform)
    assert relative_error(source, transforms_for(source, recipe, tokens), recipe, tokens) < LARGEST_RELATIVE_ERROR
