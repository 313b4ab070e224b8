"""The layer whose clips are learned is the simulated one, and learning lowers its error."""

from pathlib import Path

import pytest
import torch

from infoquant_vllm.format import Checkpoint
from offline import PRESETS, quantize
from offline.evaluate.simulate import load_simulated
from offline.formats import Site, SiteActivations, Sites
from offline.model.hidden_states import HiddenStates
from offline.model.source import Source
from offline.progress import silent
from offline.recipe import CalibrationSize, LearnedClips, PsotLayer, Recipe
from offline.stages.fold import fold_layer
from offline.stages.learn_clips import train_clips
from offline.training.fake_quant_layer import LEARNED_CLIPS, FakeQuantLayer
from tests.common.tiny import VOCAB_SIZE, write_source
from tests.offline.test_pipeline import TEXT

CPU = torch.device("cpu")
GROUPS = Site(input_activations=SiteActivations(strategy="group", group_size=64), clip_ratio=0.95)
HEADS = Site(input_activations=SiteActivations(strategy="head"), clip_ratio=0.95)
CLIP = Site(clip_ratio=0.95)
SITES = {
    "tokens": Sites(qkv=CLIP, o=HEADS, gate_up=CLIP, down=CLIP),
    "groups": Sites(qkv=GROUPS, o=HEADS, gate_up=GROUPS, down=Site(input_activations=SiteActivations(num_bits=16))),
}


def checkpoint_of(tmp_path: Path, sites: str) -> tuple[Source, Recipe, dict[str, torch.Tensor]]:
    """A model quantized with clips as they are before learning, the recipe, and its first layer's tensors."""
    (tmp_path / "text.txt").write_text(TEXT)
    update = {
        "calibration": CalibrationSize(sequences=4, sequence_length=64),
        "psot_layer": PsotLayer(epochs=1),
        "learned_clips": None,
        "sites": SITES[sites],
    }
    recipe = PRESETS["paper"].model_copy(update=update)
    source = write_source(tmp_path / "source", attention_bias=True)
    quantize(source, tmp_path / "out", recipe=recipe, calibration=str(tmp_path / "text.txt"), progress=silent)
    checkpoint, prefix = Checkpoint(tmp_path / "out"), "model.layers.0."
    names = [name for name in checkpoint.weight_map if name.startswith(prefix)]
    return Source.open(source), recipe, {name.removeprefix(prefix): checkpoint.tensor(name) for name in names}


def hidden_of(source: Source) -> tuple[HiddenStates, torch.Tensor]:
    """Hidden states behind the first layer, and the hidden states before it."""
    tokens = torch.randint(3, VOCAB_SIZE, (4, 64), generator=torch.Generator().manual_seed(0))
    hidden = HiddenStates(source, tokens, None, [CPU])
    before = hidden.values.clone()
    hidden.forward_layer(fold_layer(source, 0, None), [], lambda *_: None)
    return hidden, before


@pytest.mark.parametrize("sites", SITES)
def test_layer_before_learning_computes_what_the_simulation_computes(tmp_path: Path, sites: str) -> None:
    source, recipe, tensors = checkpoint_of(tmp_path, sites)
    hidden, before = hidden_of(source)
    layer, rotary = hidden.copy_layer()
    found = FakeQuantLayer(0, layer, tensors, recipe.quantization_config(source.shape), LEARNED_CLIPS)(
        before, rotary
    ).detach()
    model = load_simulated(tmp_path / "out", torch.float32)
    model.model.layers[0].register_forward_hook(lambda _, __, output: outputs.append(output))
    outputs: list[torch.Tensor] = []
    model(inputs_embeds=before)
    exact = hidden.values
    assert (outputs[0] - exact).norm() > 0.02 * exact.norm()
    # last bits decide about ties: levels of heads are often half-way between two int8 values
    assert (found - outputs[0]).norm() < 0.1 * (exact - outputs[0]).norm()


def test_learning_lowers_the_layers_error_and_moves_every_clip(tmp_path: Path) -> None:
    source, recipe, tensors = checkpoint_of(tmp_path, "tokens")
    hidden, before = hidden_of(source)
    layer, rotary = hidden.copy_layer()
    quantized = FakeQuantLayer(0, layer, tensors, recipe.quantization_config(source.shape), LEARNED_CLIPS)
    for parameter in quantized.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(-2.0)  # factors of 0.56, which cut off far too much

    def error() -> float:
        with torch.no_grad():
            return (quantized(before, rotary) - hidden.values).square().mean().item()

    start, clips = error(), quantized.clips()
    assert {name: clip.shape for name, clip in clips.items()} == {
        name: tensor.shape
        for name, tensor in tensors.items()
        if name.endswith(("input_clip_ratio", "value_clip_ratio"))
    }
    train_clips(quantized, rotary, before, hidden.values, LearnedClips(epochs=10, learning_rate=0.3))
    assert error() < 0.7 * start
    for name, clip in quantized.clips().items():
        assert (clip > 0.5).all(), name
        assert (clip <= 1).all(), name
        assert (clip != clips[name]).all(), name
    assert quantized.clips()["mlp.gate_proj.input_clip_ratio"].min() > 0.7
