"""Experts are calibrated on the tokens that they get, on some dealt to them, or refused by number."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from offline import PRESETS, Report, ToolError, quantize
from offline.progress import silent
from offline.recipe import CalibrationSize, Distillation, ExpertCalibration, LearnedClips, Recipe
from tests.common.tiny import SIZES, write_source

TEXT = "".join(f"The number {n} is followed by {n + 1}.\n" for n in range(300))
TOKENS, LAYERS = 4 * 64, ("model.layers.0", "model.layers.1")
CHOSEN = TOKENS * SIZES["qwen3-moe"]["num_experts_per_tok"] // SIZES["qwen3-moe"]["num_experts"]
"""Tokens of each expert if all get the same number."""


def report_of(folder: Path, avoided: bool = False, **experts: Any) -> Report:
    """Quantize a mixture of 8 experts; with `avoided` the routers never choose the last two.

    Of two opposite scores one is above 0, so three such pairs have the three highest ones.
    """
    source, text = write_source(folder / "source", **SIZES["qwen3-moe"]), folder / "text.txt"
    text.write_text(TEXT)
    tensors = load_file(source / "model.safetensors")
    for layer in LAYERS if avoided else ():
        router = tensors[f"{layer}.mlp.gate.weight"]
        router[3:6], router[6:] = -router[:3], 0.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(
        name="test",
        transform="none",
        rounding="gptq",
        equalize=True,
        calibration=CalibrationSize(sequences=4, sequence_length=64),
        experts=ExpertCalibration(**experts),
    )
    return quantize(source, folder / "out", recipe=recipe, calibration=str(text), progress=silent)


def test_experts_with_few_tokens_are_dealt_some(tmp_path: Path) -> None:
    found = report_of(tmp_path, least_share=1.0).expert_tokens
    assert found.keys() == set(LAYERS)
    for counts in found.values():
        assert sum(routed for routed, _ in counts) == CHOSEN * len(counts)
        assert [dealt for routed, dealt in counts] == [max(0, CHOSEN - routed) for routed, dealt in counts]


def test_experts_without_tokens_are_refused_unless_so_many_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"model\.layers\.0: .* expert 6, the 1\. such expert so far and 0 are allowed"):
        report_of(tmp_path / "none", avoided=True)
    with pytest.raises(ToolError, match=r"model\.layers\.1: .* expert 7, the 4\. such expert so far and 3 are allowed"):
        report_of(tmp_path / "three", avoided=True, unseen=3)
    found = report_of(tmp_path / "four", avoided=True, unseen=4).expert_tokens
    assert all(counts[6:] == [(0, CHOSEN // 4)] * 2 for counts in found.values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"distillation": Distillation()}, "distillation"),
        ({"learned_clips": LearnedClips()}, "learned_clips"),
        ({"transform": "psot-layer"}, "psot-layer"),
    ],
)
def test_stages_that_train_a_layer_as_a_whole_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    source = write_source(tmp_path / "source", **SIZES["mixtral"])
    with pytest.raises(ToolError, match=f"{named}.* is not made for mixtures of experts"):
        quantize(source, tmp_path / "out", recipe=PRESETS["fast"].model_copy(update=changes), progress=silent)
