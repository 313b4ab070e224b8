"""Every option of vLLM that reads or writes hidden states is served or refused by name, before a layer is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from infoquant_vllm import register
from infoquant_vllm.adapters import AdapterGuard
from infoquant_vllm.config import InfoQuantConfig
from infoquant_vllm.format import BASIS_CONFIG, PROJECTION_TENSOR, PROJECTION_WEIGHTS, FormatError, parse_config
from infoquant_vllm.loading import LoadTracker
from offline import PRESETS, Recipe, quantize
from offline.progress import silent
from offline.recipe import CalibrationSize
from tests.common.checkpoints import hf_config, quantization_config
from tests.common.tiny import SIZES, write_source

ROTATED = Recipe(name="hadamard-rtn", transform="hadamard", rounding="rtn")
EAGLE = {"architectures": ["EagleLlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "vocab_size": 272}
RERANKER = {
    "architectures": ["LlamaForSequenceClassification"],
    "classifier_from_token": ["a", "b"],
    "method": "from_2_way_softmax",
}
EMBED: dict[str, Any] = {"runner": "pooling", "convert": "embed"}
CLASSIFY: dict[str, Any] = {"runner": "pooling", "convert": "classify"}
TOKENS: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


def checkpoint(folder: Path, size: str, recipe: Recipe) -> Path:
    quantize(write_source(folder / "source", **SIZES[size]), folder / "out", recipe=recipe, progress=silent)
    return folder / "out"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied model in a rotated basis."""
    return checkpoint(tmp_path_factory.mktemp("untied"), "untied", ROTATED)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model in a rotated basis."""
    return checkpoint(tmp_path_factory.mktemp("tied"), "tied", ROTATED)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in the source's basis."""
    return checkpoint(tmp_path_factory.mktemp("plain"), "tied", PRESETS["rtn"])


def start(model: Path, **options: Any) -> None:
    """Ask for the method of a first layer, as vLLM does with these options."""
    register()
    arguments = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    config = EngineArgs(str(model), **arguments | options).create_engine_config()
    assert config.quant_config is not None
    with set_current_vllm_config(config):
        config.quant_config.get_quant_method(torch.nn.Module(), "model.embed_tokens")


def eagle(folder: Path) -> dict[str, Any]:
    draft = EAGLE | {"num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 320}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(draft))
    return {"method": "eagle", "model": str(folder), "num_speculative_tokens": 1}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "embeddings in the prompt": ({"enable_prompt_embeds": True}, "--enable-prompt-embeds is not served.*send tokens"),
    "extracted hidden states": (
        {
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [1]}},
            },
            "kv_transfer_config": {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer"},
        },
        "method 'extract_hidden_states' is not served.*a draft that reads tokens",
    ),
    "a classifier": (CLASSIFY, r"--convert classify \(LlamaForCausalLM\) is not served.*holds no head"),
    "a reward model": (
        {"runner": "pooling", "hf_overrides": {"architectures": ["Qwen2ForRewardModel"]}},
        r"--convert none \(Qwen2ForRewardModel\) is not served.*holds no head",
    ),
}


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("model", ["untied", "tied"])
def test_an_option_is_refused_by_name(option: str, model: str, request: pytest.FixtureRequest) -> None:
    options, message = REFUSED[option]
    folder = request.getfixturevalue(model)
    with pytest.raises(FormatError, match=f"^{folder}: .*{message}.*unquantized model"):
        start(folder, **options)


def test_a_draft_that_reads_hidden_states_is_refused_by_name(untied: Path, plain: Path, tmp_path: Path) -> None:
    speculation = eagle(tmp_path / "eagle")
    with pytest.raises(FormatError, match=r"--speculative-config with method 'eagle' is not served"):
        start(untied, speculative_config=speculation)
    start(plain, speculative_config=speculation)


def test_what_takes_rows_of_a_tied_rotated_matrix_is_refused_by_name(untied: Path, tied: Path, plain: Path) -> None:
    with pytest.raises(FormatError, match=r"classifier_from_token is not served.*rotated and tied to lm_head"):
        start(tied, **CLASSIFY, hf_overrides=RERANKER)
    for folder in (untied, plain):
        start(folder, **CLASSIFY, hf_overrides=RERANKER)


def test_what_takes_rows_of_an_8_bit_lm_head_is_refused_by_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "untied", ROTATED.model_copy(update={"lm_head_bits": 8}))
    with pytest.raises(FormatError, match=r"classifier_from_token is not served.*of 8 bits"):
        start(folder, **CLASSIFY, hf_overrides=RERANKER)


@pytest.mark.parametrize("options", [EMBED, {"speculative_config": TOKENS}], ids=["embeddings", "drafts of tokens"])
@pytest.mark.parametrize("model", ["untied", "tied"])
def test_served_options_are_accepted(model: str, options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    start(request.getfixturevalue(model), **options)


def test_a_model_in_the_sources_basis_takes_embeddings_in_the_prompt(plain: Path) -> None:
    start(plain, enable_prompt_embeds=True)


@pytest.mark.parametrize("options", [{"enable_prompt_embeds": True}, EMBED, {"speculative_config": TOKENS}])
def test_a_quantized_cache_alone_leaves_hidden_states_and_embeddings_as_they_are(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    recipe = PRESETS["kv4"].model_copy(update={"calibration": CalibrationSize(sequences=2, sequence_length=32)})
    start(checkpoint(tmp_path, "tied", recipe), **options)


def test_scaled_logits_are_refused_in_the_transformers_backend_which_ignores_them(tmp_path: Path) -> None:
    granite = checkpoint(tmp_path, "granite", PRESETS["rtn"])
    start(granite)
    with pytest.raises(FormatError, match=r"--model-impl transformers is not served.* logits_scaling 2\.0"):
        start(granite, model_impl="transformers")


@pytest.mark.parametrize("model", ["untied", "tied", "plain"])
def test_adapters_are_accepted(model: str, request: pytest.FixtureRequest) -> None:
    start(request.getfixturevalue(model), enable_lora=True)
    start(request.getfixturevalue(model), enable_lora=True, lora_target_modules=["q_proj", "mlp.down_proj"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_impl": "transformers"}, "LoRA adapters are not served by the Transformers backend; merge"),
        (EMBED, "LoRA adapters are not served with --runner pooling; merge"),
        ({"lora_target_modules": ["o_proj", "lm_head"]}, "--lora-target-modules lm_head is not served, only down_proj"),
    ],
)
def test_an_option_that_goes_with_no_adapter_is_refused_by_name(
    untied: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        start(untied, enable_lora=True, **options)


def test_adapters_without_a_basis_are_refused_by_file(tmp_path: Path) -> None:
    mixture = checkpoint(tmp_path, "mixtral", ROTATED)
    with pytest.raises(FormatError, match=f"{mixture}: LoRA .* no {BASIS_CONFIG} to turn them by.*quantize the source"):
        start(mixture, enable_lora=True)


def test_adapters_of_a_model_that_the_plugin_does_not_see_are_refused() -> None:
    guard = AdapterGuard(InfoQuantConfig(parse_config(quantization_config(hf_config()))), "0123456789abcdef")
    with pytest.raises(FormatError, match="class of the model is not one that takes adapters"):
        guard.check()


def test_embeddings_without_a_projection_are_refused_by_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "untied", ROTATED)
    (folder / "modules.json").unlink()
    with pytest.raises(FormatError, match=r"--convert embed is not served.*no module hidden_states"):
        start(folder, **EMBED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight[:, :-1], r"holds \{'linear.weight': \[256, 255\]\}"),
        (lambda weight: weight * torch.linspace(0.5, 1.5, 256), "no rotation with a gain per row"),
        (lambda weight: weight.index_fill(0, torch.tensor([3]), float("nan")), "not finite"),
        (torch.zeros_like, "only zeros"),
    ],
    ids=["shape", "no rotation", "NaN", "zeros"],
)
def test_an_invalid_projection_is_refused_by_file(tmp_path: Path, change: Any, message: str) -> None:
    folder = checkpoint(tmp_path, "untied", ROTATED)
    file = folder / PROJECTION_WEIGHTS
    save_file({PROJECTION_TENSOR: change(load_file(file)[PROJECTION_TENSOR]).contiguous()}, file)
    with pytest.raises(FormatError, match=f"{file}.*{message}"):
        start(folder, **EMBED)


@pytest.mark.parametrize("runner", ["generate", "pooling"])
def test_weights_are_not_reloaded_under_a_projection_that_stays(tied: Path, runner: str) -> None:
    register()
    config = EngineArgs(str(tied), dtype="float32", max_model_len=256, runner=runner).create_engine_config()
    with set_current_vllm_config(config):
        load = LoadTracker({None: "down_proj"}).track("weight_scale", lambda *_: None)
    counted = torch.nn.Parameter(torch.empty(2, 1, device="meta"), requires_grad=False)
    if runner == "generate":
        load(counted, torch.ones(2, 1))
    else:
        with pytest.raises(FormatError, match=r"reload_weights is not served here: .* the projection"):
            load(counted, torch.ones(2, 1))
