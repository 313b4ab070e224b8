"""SmolLM2 as a mixture of experts computes the same text, and loses no more when it is quantized."""

from pathlib import Path

import torch

from offline import PRESETS, quantize
from offline.evaluate.metrics import Figure, compare
from offline.evaluate.simulate import load_simulated
from offline.model.reference import load_reference
from offline.model.source import Source
from offline.progress import silent
from offline.recipe import CalibrationSize
from tests.common.upcycled import first_layers, upcycle

SMALL = {"calibration": CalibrationSize(sequences=16, sequence_length=256)}
LAYERS = 6
"""Of 30: quantizing and simulating all of them takes five times as long."""
NOISE = 0.02
"""Of the experts' weights; KL between mixture and dense model is far below that of quantization."""


@torch.no_grad()
def test_equal_experts_compute_what_the_dense_model_does(smollm2: Path, tmp_path: Path) -> None:
    mixture = Source.open(upcycle(smollm2, tmp_path / "mixture"))
    tokens = torch.randint(3, mixture.shape.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
    expected = Source.open(smollm2).model(torch.float32)(tokens).logits
    found = load_reference(mixture.folder, torch.float32)(tokens).logits
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4


def quantized(source: Path, output: Path, text: Path, windows: torch.Tensor) -> dict[str, Figure]:
    """Quantize by `quarot` on a short text; return the figures against the source."""
    recipe = PRESETS["quarot"].model_copy(update=SMALL)
    report = quantize(source, output, recipe=recipe, calibration=str(text), progress=silent)
    assert all(routed > 0 for counts in report.expert_tokens.values() for routed, _ in counts)
    return compare(list(windows), load_simulated(output, torch.float32), Source.open(source).model(torch.float32))


def test_mixture_loses_about_as_much_as_the_dense_model(smollm2: Path, tmp_path: Path, windows: torch.Tensor) -> None:
    text, source = smollm2.with_name("language-reference.txt"), first_layers(smollm2, tmp_path / "source", LAYERS)
    dense = quantized(source, tmp_path / "dense", text, windows[:2, :256])
    mixture = upcycle(source, tmp_path / "mixture", noise=NOISE)
    found = quantized(mixture, tmp_path / "quantized", text, windows[:2, :256])
    print({name: (figure.mean, found[name].mean) for name, figure in dense.items()}, found["routing_agreement"])
    assert found["kl"].mean < dense["kl"].mean
    assert found["routing_agreement"].mean > 0.8
