"""Every layer gets rotations of its own that suppress the peaks of its inputs."""

from pathlib import Path

import torch

from offline.algorithms.rotations import Transforms
from offline.model.source import Source
from offline.presets import PRESETS
from offline.recipe import PsotLayer
from offline.stages.rotate_per_layer import learn_layer_rotations
from tests.common.runs import run_of
from tests.common.tiny import VOCAB_SIZE, write_source


def learn(source: Source, **args: int) -> tuple[Transforms, list[float]]:
    """Rotations of a model, and the last epoch's share of each loss."""
    tokens = torch.randint(3, VOCAB_SIZE, (8, 64), generator=torch.Generator().manual_seed(0))
    left: list[float] = []

    def note(stage: str, done: int, total: int, detail: str = "") -> None:
        left.extend(float(part) for part in detail.removeprefix("losses at ").split(" of ")[0].split(", "))

    recipe = PRESETS["paper"].model_copy(update={"psot_layer": PsotLayer(**args)})
    run = run_of(source, recipe, progress=note)
    return learn_layer_rotations(run, tokens, torch.Generator().manual_seed(1)), left


def test_every_loss_falls_and_every_rotation_is_orthogonal_and_seeded(tmp_path: Path) -> None:
    source = Source.open(write_source(tmp_path / "source"))
    transforms, left = learn(source, epochs=6)
    assert len(left) == 6
    assert max(left) < 0.97
    assert transforms.residual is None
    assert transforms.heads is not None
    for matrices in (transforms.heads, *(layer[site]["input_blocks"] for layer in transforms.inputs for site in layer)):
        eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
        assert (matrices @ matrices.mT - eye).abs().max() < 1e-6
    again, _ = learn(source, epochs=6)
    assert torch.equal(again.heads, transforms.heads)
    assert torch.equal(again.inputs[1]["qkv"]["input_blocks"], transforms.inputs[1]["qkv"]["input_blocks"])
