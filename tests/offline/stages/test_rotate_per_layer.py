"""Each layer's own rotations press down the peaks of their inputs, by the published objective."""

from pathlib import Path
from tempfile import mkdtemp

import torch

from offline.algorithms.rotations import Transforms
from offline.model.source import Source
from offline.output.store import Store
from offline.recipe import PsotLayer
from offline.stages.rotate_per_layer import center, input_loss, learn_layer_rotations, peak_norm, rotate
from tests.common.tiny import VOCAB_SIZE, write_source

CPU = torch.device("cpu")


def learn(source: Source, **args: int) -> tuple[Transforms, list[float]]:
    """Rotations of a model, and what is left of each loss."""
    tokens = torch.randint(3, VOCAB_SIZE, (8, 64), generator=torch.Generator().manual_seed(0))
    left: list[float] = []

    def note(stage: str, done: int, total: int, detail: str = "") -> None:
        left.extend(float(part) for part in detail.removeprefix("losses at ").split(" of ")[0].split(", "))

    generator = torch.Generator().manual_seed(1)
    store = Store(Path(mkdtemp(dir=source.folder.parent)))
    return learn_layer_rotations(source, tokens, PsotLayer(**args), generator, [CPU], note, store), left


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


def test_learnt_rotation_lowers_the_peaks_of_outlier_tokens(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 32, 2, 1, 16, generator=generator)
    x[:, 0, 0, 0, 5] = 40.0
    weights = torch.ones(8, 32)
    weights[:, 0] = 30.0
    loss, rotation = input_loss(x, weights, 2.0, CPU), torch.eye(16).expand(2, 16, 16).contiguous()
    spread = torch.linalg.qr(torch.randn(2, 16, 16, generator=generator))[0]
    assert loss(spread, slice(0, 8)) < 0.7 * loss(rotation, slice(0, 8))


def test_peak_norm_is_the_formula() -> None:
    y, weights = torch.tensor([[1.0, -3.0], [2.0, 0.0]]), torch.tensor([1.0, 30.0])
    shares = torch.tensor([[0.5, 1.5], [1.0, 0.0]]).softmax(1)  # |y| / temperature
    expected = ((shares[0, 0] * 1) ** 2 + (shares[0, 1] * 3) ** 2 + (shares[1, 0] * 2 * 30) ** 2).sqrt()
    torch.testing.assert_close(peak_norm(y, weights, 2.0), expected)


def test_rotation_acts_on_each_block_and_centring_on_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    x, rotations = torch.randn(5, 3, 2, 4, generator=generator), torch.randn(3, 4, 4, generator=generator)
    found = rotate(x, rotations)
    for block in range(3):
        torch.testing.assert_close(found[:, block], x[:, block] @ rotations[block])
    torch.testing.assert_close(center(found).mean(-1), torch.zeros(5, 3, 2))
