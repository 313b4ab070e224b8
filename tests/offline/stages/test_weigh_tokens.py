"""Tokens weigh what errors at them cost the loss: against autograd's own gradients, and in the Hessians."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import offline
from offline.errors import ToolError
from offline.model.input_statistics import InputStatistics
from offline.model.source import Source
from offline.output.store import Store
from offline.presets import PRESETS
from offline.progress import silent
from offline.recipe import CalibrationSize, Gptq, Psot, Recipe
from offline.run import Run
from offline.stages.weigh_tokens import weigh_tokens
from tests.common.tiny import write_source

CPU = torch.device("cpu")
RECIPE = PRESETS["fast"].model_copy(
    update={
        "gptq": Gptq(guided=True),
        "calibration": CalibrationSize(sequences=4, sequence_length=32),
        "psot": Psot(steps=2),
    }
)


def run_of(source: Path, folder: Path, recipe: Recipe = RECIPE) -> Run:
    opened = Source.open(source)
    config = recipe.quantization_config(opened.shape)
    return Run(opened, recipe, config, 0, [CPU], silent, Store(folder, persistent=True))


@pytest.mark.parametrize("site", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)])
def test_weights_are_the_norms_of_gradients_of_drawn_tokens(tmp_path: Path, site: tuple[str, ...]) -> None:
    source = write_source(tmp_path / "source")
    tokens = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(1))
    found = weigh_tokens(run_of(source, tmp_path / "work"), tokens)
    assert len(found) == 2 * 4
    assert all(abs(each.mean() - 1) < 1e-5 for each in found.values())
    model, generator = Source.open(source).model(torch.float32), torch.Generator().manual_seed(0)
    changes: list[torch.Tensor] = []

    def add_zero(_: torch.nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        changes.append(torch.zeros_like(out, requires_grad=True))
        return out + changes[-1]

    for linear in site:
        model.model.layers[1].get_submodule(linear).register_forward_hook(add_zero)
    norms = []
    for ids in tokens:
        changes.clear()
        logits = model(ids[None], use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        gradients = torch.autograd.grad(functional.cross_entropy(logits, drawn, reduction="sum"), changes)
        norms.append(torch.cat(gradients, dim=-1)[0].norm(dim=1))
    expected = torch.cat(norms)
    torch.testing.assert_close(found[f"model.layers.1.{site[0]}"], expected / expected.mean(), rtol=1e-4, atol=1e-5)


def test_hessians_and_sums_are_weighted_batch_after_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(30, 8, generator=generator), torch.rand(30, generator=generator)
    statistics = InputStatistics({"down": weights})
    for part in x.split([7, 20, 3]):
        statistics.observe("down", part)
        statistics.observe("other", part)
    hessians = statistics.take_hessians()
    torch.testing.assert_close(hessians["down"], torch.einsum("t,ti,tj->ij", weights, x, x))
    torch.testing.assert_close(hessians["other"], x.T @ x)
    torch.testing.assert_close(statistics.sums["down"], weights @ x)


def test_guiding_changes_codes_and_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source, text = write_source(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text("".join(f"The number {n} is followed by {n + 1}.\n" for n in range(200)))

    def stop(stage: str, done: int, *_: object) -> None:
        if (stage, done) == ("layers", 1):
            raise KeyboardInterrupt

    def make(name: str, recipe: Recipe, resume: bool = False, progress: object = silent) -> dict[str, torch.Tensor]:
        offline.quantize(
            source, tmp_path / name, recipe=recipe, calibration=str(text), resume=resume, progress=progress
        )
        return load_file(tmp_path / name / "model-00001-of-00001.safetensors")

    whole = make("whole", RECIPE)
    with pytest.raises(KeyboardInterrupt):
        make("resumed", RECIPE, resume=True, progress=stop)
    resumed = make("resumed", RECIPE, resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    plain = make("plain", RECIPE.model_copy(update={"gptq": Gptq()}))
    assert any(not torch.equal(plain[name], whole[name]) for name in whole if name.endswith("weight_packed"))


def _changed(source: Path, factor: float, *names: str) -> None:
    file = source / "model.safetensors"
    tensors = load_file(file)
    save_file({name: t * (factor if name in names else 1) for name, t in tensors.items()}, file, {"format": "pt"})


def test_sites_without_a_gradient_weigh_all_tokens_alike(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    _changed(source, 0.0, "model.layers.0.mlp.down_proj.weight")
    found = weigh_tokens(run_of(source, tmp_path / "work"), torch.full((1, 8), 5))
    assert (found["model.layers.0.mlp.gate_proj"] == 1).all()
    assert not (found["model.layers.0.mlp.down_proj"] == 1).all()


def test_logits_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", tie_word_embeddings=False)
    _changed(source, 1e30, "model.norm.weight", "lm_head.weight")
    with pytest.raises(ToolError, match=re.escape(f"{source}: logits are not finite on the calibration text")):
        weigh_tokens(run_of(source, tmp_path / "work"), torch.full((1, 8), 5))
