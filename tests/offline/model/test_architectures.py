"""Every class in the table is quantized into a checkpoint that still behaves like its source."""

from pathlib import Path

import pytest
import torch

from infoquant_vllm.format import ARCHITECTURES, NORMS, Checkpoint, ModelShape
from offline import PRESETS, quantize
from offline.evaluate.metrics import compare
from offline.evaluate.simulate import load_simulated
from offline.evaluate.verify import verify
from offline.model.architectures import empty_model, model_class, read_config
from offline.model.hidden_states import HiddenStates
from offline.model.reference import load_reference
from offline.model.source import Source
from offline.progress import silent
from offline.recipe import CalibrationSize, Psot
from offline.stages.fold import fold_expert, fold_layer
from tests.common.checkpoints import hf_config
from tests.common.tiny import FAMILIES, SIZES, VOCAB_SIZE, write_source

SMALL = {"calibration": CalibrationSize(sequences=16, sequence_length=128), "psot": Psot(steps=3)}
TEXT = "".join(f"The number {n} is followed by {n + 1}, and its square is {n * n}.\n\n" for n in range(300))
LARGEST_KL = {"rtn": 1.0, "quarot": 0.5, "fast": 0.5}
"""Nats; predictions of another position are at 0.9 to 1.5."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_class_of_the_table_is_one_of_transformers_with_its_model_type(name: str) -> None:
    assert model_class(name).__name__ == name
    assert model_class(name).config_class.model_type == ARCHITECTURES[name].model_type


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_and_norms_are_all_the_linears_and_norms_of_a_layer(name: str) -> None:
    config = hf_config(architectures=[name], pad_token_id=0)
    shape = ModelShape.from_hf(config)
    layer = empty_model(shape, read_config(shape, config, Path("config.json"))).model.layers[0]
    linears = {name for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears - shape.gates.keys() == {linear for linears in shape.sites.values() for linear in linears}
    assert all(layer.get_submodule(gate).weight.shape == size for gate, size in shape.gates.items())
    assert {name for name, _ in layer.named_children() if "norm" in name} == set(NORMS[ARCHITECTURES[name].norms])


def test_every_class_is_among_the_tiny_models() -> None:
    assert {SIZES[size].get("architecture", "LlamaForCausalLM") for size in FAMILIES} == set(ARCHITECTURES)


@torch.no_grad()
@pytest.mark.parametrize("size", FAMILIES)
def test_layers_one_by_one_compute_what_the_model_does(tmp_path: Path, size: str) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    tokens = torch.randint(3, VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(1))
    hidden, model = HiddenStates(source, tokens, None, [torch.device("cpu")]), source.model(torch.float32).model
    for layer in range(source.shape.num_hidden_layers):
        hidden.forward_layer(fold_layer(source, layer, None), [], lambda *_: None)
        for expert in range(source.shape.num_experts):
            hidden.forward_expert(expert, fold_expert(source, layer, expert, None), lambda *_: None)
    torch.testing.assert_close(model.norm(hidden.values), model(tokens).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_an_untied_mixture_of_granite_rotates_the_residual_stream(tmp_path: Path) -> None:
    """Tied ones, of which vLLM's class quantizes no embedding, do not."""
    text, rotated = tmp_path / "text.txt", {}
    text.write_text(TEXT)
    for tied in (True, False):
        source = write_source(tmp_path / f"{tied}", **SIZES["granite-moe"] | {"tie_word_embeddings": tied})
        out, recipe = tmp_path / f"{tied} out", PRESETS["fast"].model_copy(update=SMALL)
        quantize(source, out, recipe=recipe, calibration=str(text), progress=silent)
        assert verify(out, against=str(source)).passed
        rotated[tied] = Checkpoint(out).config.rotated_hidden_states
    assert rotated == {True: False, False: True}


@torch.no_grad()
def test_soft_caps_are_those_of_transformers_own_attention(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", **SIZES["gemma2"])
    theirs = model_class("Gemma2ForCausalLM").from_pretrained(folder, attn_implementation="eager")
    tokens = torch.randint(3, VOCAB_SIZE, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    for ours in (Source.open(folder).model(torch.float32), load_reference(folder, torch.float32)):
        torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    theirs.set_attn_implementation("sdpa")  # which ignores them
    assert (theirs(tokens).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("preset", LARGEST_KL)
@pytest.mark.parametrize("size", FAMILIES)
def test_quantized_model_behaves_like_its_source(tmp_path: Path, size: str, preset: str) -> None:
    source, text = write_source(tmp_path / "source", **SIZES[size]), tmp_path / "text.txt"
    text.write_text(TEXT)
    recipe = PRESETS[preset].model_copy(update=SMALL)
    quantize(source, tmp_path / "out", recipe=recipe, calibration=str(text), progress=silent)
    windows = torch.randint(3, VOCAB_SIZE, (4, 64), generator=torch.Generator().manual_seed(1))
    model, reference = load_simulated(tmp_path / "out", torch.float32), Source.open(source).model(torch.float32)
    figures = compare(list(windows), model, reference)
    if Checkpoint(tmp_path / "out").shape.experts is not None:
        assert figures["routing_agreement"].mean > 0.6
        assert figures["kl"].mean < LARGEST_KL[preset] + 0.2  # routers of random weights choose by small differences
    else:
        assert "routing_agreement" not in figures
        assert figures["kl"].mean < LARGEST_KL[preset]
