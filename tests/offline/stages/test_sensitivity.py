"""What formats cost alone is KL to the source, measured and scaled as defined."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from infoquant_vllm.format import Checkpoint, WeightArgs
from offline import quantize
from offline.algorithms.fake_quantize import dequantized_weight
from offline.choices import site_choices
from offline.formats import Site, SiteActivations, Sites
from offline.model.architectures import CausalLM
from offline.model.source import Source
from offline.output.store import Store
from offline.progress import silent
from offline.recipe import CalibrationSize, KVCache, Recipe
from offline.run import Run
from offline.stages.calibrate import save_tokens
from offline.stages.rotate import make_transforms
from offline.stages.sensitivity import LENGTH, SEQUENCES, Sensitivity, measure_sensitivity
from offline.stages.site_kl import scaled
from tests.common.tiny import FAMILIES, MIXTURES, SIZES, VOCAB_SIZE, write_source

EIGHT = Site(
    weights=WeightArgs(num_bits=8, symmetric=False), input_activations=SiteActivations(num_bits=8), clip_ratio=1.0
)
ALL_EIGHT = Sites(qkv=EIGHT, o=EIGHT, gate_up=EIGHT, down=EIGHT)
TOKENS = torch.randint(3, VOCAB_SIZE - 13, (6, 96), generator=torch.Generator().manual_seed(0))


def recipe(**update: object) -> Recipe:
    base = Recipe(
        name="r", transform="none", rounding="gptq", calibration=CalibrationSize(sequences=6, sequence_length=96)
    )
    return base.model_copy(update=update)


def measured(folder: Path, source: Source, chosen: Recipe, device: str = "cpu") -> Sensitivity:
    run = Run(
        source,
        chosen,
        chosen.quantization_config(source.shape),
        0,
        [torch.device(device)],
        silent,
        Store(folder / "store"),
    )
    transforms = make_transforms(run, TOKENS)
    return measure_sensitivity(run, TOKENS, transforms, site_choices(chosen, source.shape))


def kl(source: Source, change: Callable[[CausalLM], None]) -> float:
    """KL of a changed model on the measured tokens, by its whole logits."""
    ids = TOKENS[:SEQUENCES, :LENGTH]
    plain, other = source.model(torch.float32), source.model(torch.float32)
    change(other)
    with torch.no_grad():
        log_p, log_q = (model(ids).logits.double().log_softmax(-1).flatten(0, 1) for model in (plain, other))
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()


@pytest.mark.parametrize(("size", "layer"), [("tied", 0), ("untied-biases", 1), ("granite", 0), ("gemma3", 0)])
def test_one_site_alone_costs_what_the_whole_model_loses_with_its_weights(
    tmp_path: Path, size: str, layer: int
) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    chosen, file = recipe(), tmp_path / "tokens.safetensors"
    found = measured(tmp_path, source, chosen)
    save_tokens(file, TOKENS)
    quantize(source.folder, tmp_path / "out", recipe=chosen, calibration=str(file), progress=silent)
    checkpoint = Checkpoint(tmp_path / "out")
    for site, linears in (("qkv", ("q_proj", "k_proj", "v_proj")), ("o", ("o_proj",))):

        def change(model: CausalLM, linears: tuple[str, ...] = linears) -> None:
            for linear in linears:
                name = f"model.layers.{layer}.self_attn.{linear}"
                tensors = {key: checkpoint.tensor(f"{name}.{key}") for key in ("weight_packed", "weight_scale")}
                with torch.no_grad():
                    model.get_submodule(name).weight.copy_(dequantized_weight(tensors, WeightArgs(num_bits=4)))

        assert found.weights[site][layer][0] == pytest.approx(kl(source, change), rel=0.02)


@pytest.mark.parametrize("size", [size for size in FAMILIES if size not in MIXTURES])
def test_formats_that_lose_next_to_nothing_cost_next_to_nothing_in_every_class(tmp_path: Path, size: str) -> None:
    source = Source.open(write_source(tmp_path / "source", **SIZES[size]))
    chosen = recipe(transform="hadamard", equalize=True, sites=ALL_EIGHT, kv_cache=KVCache(key_mean_positions=96))
    found = measured(tmp_path, source, chosen)
    assert found.linears < 3e-3  # what later layers get wrong would cost 0.1 and more
    assert found.caches["8,8"] < 3e-3
    assert found.caches["8,8"] < min(found.caches["4,8"], found.caches["8,4"]) < found.caches["4,4"]
    assert 0 < found.lm_head < 3e-3


def test_sites_add_up_to_the_whole(tmp_path: Path) -> None:
    source = Source.open(write_source(tmp_path / "source", num_hidden_layers=4))
    found = measured(tmp_path, source, recipe(transform="hadamard"))
    alone = sum(own[0] for part in (found.weights, found.inputs) for layers in part.values() for own in layers)
    assert found.linears == pytest.approx(alone, rel=0.3)


def test_finer_formats_cost_less(tmp_path: Path) -> None:
    source = Source.open(write_source(tmp_path / "source"))
    chosen = recipe(transform="hadamard")
    found, choices = measured(tmp_path, source, chosen), site_choices(chosen, source.shape)
    for site, own in choices.items():
        for of_weights, of_inputs in zip(found.weights[site], found.inputs[site], strict=True):
            by_bits = {
                (args.num_bits, args.group_size): cost for args, cost in zip(own.weights, of_weights, strict=True)
            }
            assert by_bits[8, None] < by_bits[4, 32] < by_bits[4, 64]
            assert by_bits[8, None] < 0.02 * by_bits[4, None]
            assert of_inputs[-1] < 0.02 * of_inputs[0]


def test_other_formats_cost_in_proportion_to_their_errors() -> None:
    assert scaled(0.3, [4.0, 2.0, 0.0], 1) == pytest.approx([0.6, 0.3, 0.0])
    assert scaled(0.3, [0.0, 0.0], 0) == [0.0, 0.0]
