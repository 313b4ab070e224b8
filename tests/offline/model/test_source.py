"""A source model that is not whole, or not one the tool knows, is refused by file, tensor and number."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infoquant_vllm.format import INDEX_FILE, Checkpoint, FormatError
from offline.errors import ToolError
from offline.model.reference import load_reference
from offline.model.source import Source
from tests.common.tiny import MIXTURES, SIZES, write_source

FILE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("whole") / "source")


@pytest.fixture(scope="module")
def whole_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("sharded") / "source", max_shard_size="1MB")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "source"))


@pytest.fixture
def sharded(whole_sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_sharded, tmp_path / "source"))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        Source.open(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors: dict[str, Any] = load_file(folder / FILE) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / FILE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shard", ["1GB", "1MB"])
def test_model_is_read_whole(tmp_path: Path, size: str, shard: str) -> None:
    source = Source.open(write_source(tmp_path / "source", max_shard_size=shard, **SIZES[size]))
    state = source.model(torch.float32).state_dict()
    assert all(torch.equal(state[name], source.tensor(name)) for name in source.names)
    assert set(state) - set(source.names) <= {"lm_head.weight"}


def test_weights_keep_a_tied_head_tied(folder: Path) -> None:
    model = Source.open(folder).model(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unknown_architecture_is_refused_with_the_known_ones(folder: Path) -> None:
    edit_config(folder, architectures=["MambaForCausalLM"])
    refused(folder, r"config\.json: architectures is \['MambaForCausalLM'\]; this release knows LlamaForCausalLM")


def test_quantized_model_is_refused_with_its_method(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    refused(folder, "already quantized \\(quant_method 'gptq'\\)")


def test_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, f"{shard.name}: the shard is missing")


def test_extra_shard_is_named(sharded: Path) -> None:
    save_file({"model.extra": torch.zeros(1)}, sharded / "model-extra.safetensors")
    refused(sharded, r"model-extra\.safetensors: an extra safetensors file")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_shard_is_named(sharded: Path, share: float) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: int(share * len(data))])
    refused(sharded, f"{shard.name}: not a whole safetensors file")


def test_index_that_disagrees_with_a_shard_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    other = next(shard for shard in index["weight_map"].values() if shard != index["weight_map"][UP])
    index["weight_map"][UP] = other
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    refused(sharded, f"{UP}")


def test_missing_tensor_is_named_with_its_shape(folder: Path) -> None:
    edit_tensors(folder, {UP: None})
    refused(folder, rf"tensor {UP} \[320, 256\] is missing")


def test_unexpected_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, {"model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)})
    refused(folder, rf"{FILE}: unexpected tensor model\.layers\.2\.mlp\.up_proj\.weight")


def test_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    edit_tensors(folder, {UP: torch.zeros(320, 128)})
    refused(folder, rf"{FILE}: {UP} has shape \[320, 128\], config\.json asks for \[320, 256\]")


def test_integer_weights_are_refused(folder: Path) -> None:
    edit_tensors(folder, {UP: torch.zeros(320, 256, dtype=torch.int8)})
    refused(folder, f"{UP} is I8, expected BF16, F16, F32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_no_number_is_named_with_its_place(folder: Path, value: float) -> None:
    weight = torch.zeros(320, 256)
    weight[5, 7] = value
    edit_tensors(folder, {UP: weight})
    source = Source.open(folder)
    with pytest.raises(ToolError, match=rf"{FILE}: {UP}\[5, 7\] is {value:g}, expected finite numbers \(1 of 81920"):
        source.model(torch.float32)


def test_pickles_are_not_read(folder: Path) -> None:
    (folder / FILE).rename(folder / "pytorch_model.bin")
    refused(folder, r"no safetensors files \(it holds pytorch_model\.bin, and pickles are not read")


def test_missing_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, r"no tokenizer \(tokenizer\.json or tokenizer\.model was expected\)")


def test_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ToolError, match="the tokenizer cannot be read"):
        Source.open(folder).tokenizer()


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")


def test_second_copy_under_other_names_is_left_alone(folder: Path) -> None:
    save_file({"tok_embeddings.weight": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert set(Source.open(folder).weight_map.values()) == {FILE}


def test_sliding_window_is_refused_with_file_and_numbers(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", sliding_window=128)  # vLLM would cut Llama's attention, transformers not
    refused(folder, r"config\.json: sliding_window 128 is below max_position_embeddings 512")


def test_rope_tables_of_old_checkpoints_are_no_tensors_of_the_model(folder: Path) -> None:
    edit_tensors(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)})
    assert not any("inv_freq" in name for name in Source.open(folder).names)


def trained_head(folder: Path) -> torch.Tensor:
    """Give a tied model a head of its own, as fine-tuning leaves it, and return that."""
    head = load_file(folder / FILE)["model.embed_tokens.weight"].flip(0).contiguous()
    edit_tensors(folder, {"lm_head.weight": head})
    return head


def test_head_of_a_model_that_config_calls_tied_is_used_where_it_differs(folder: Path) -> None:
    head = trained_head(folder)
    source = Source.open(folder)
    assert not source.shape.tie_word_embeddings
    assert source.hf_config["tie_word_embeddings"] is False
    assert torch.equal(source.tensor("lm_head.weight"), head)


def test_head_of_its_own_is_refused_where_vllms_class_has_none(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", **SIZES["gemma2"])
    trained_head(folder)
    refused(folder, "its lm_head.weight is another than the embedding: tie_word_embeddings is false.*Gemma2ForCausalLM")


def test_last_row_of_a_head_decides_whether_it_is_tied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offline.model.source.ROWS_AT_A_TIME", 100)
    head = load_file(folder / FILE)["model.embed_tokens.weight"].clone()
    edit_tensors(folder, {"lm_head.weight": head})
    assert "lm_head.weight" not in Source.open(folder).names
    head[-1, -1] += 1
    edit_tensors(folder, {"lm_head.weight": head})
    assert "lm_head.weight" in Source.open(folder).names


@pytest.mark.parametrize("size", ["tied", "untied", "qwen2", "trained-head"])
def test_source_is_read_as_transformers_reads_it(tmp_path: Path, size: str) -> None:
    folder = write_source(tmp_path / "source", **SIZES.get(size, {}))
    if size == "trained-head":
        trained_head(folder)
    ours, theirs = Source.open(folder).model(torch.float32), load_reference(folder, torch.float32)
    assert type(ours) is type(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("size", MIXTURES)
def test_separate_experts_compute_what_transformers_does(tmp_path: Path, size: str) -> None:
    folder = write_source(tmp_path / "source", **SIZES[size])
    tokens = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    ours, theirs = Source.open(folder).model(torch.float32), load_reference(folder, torch.float32)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("input_linear", lambda t: t[:-1], r"input_linear\.weight has shape \[3, 640, 256\].* \[4, 640, 256\]"),
        ("input_linear", lambda t: t[:, 1:], r"input_linear\.weight has shape \[4, 639, 256\].* \[4, 640, 256\]"),
        ("output_linear", lambda t: t[0], r"output_linear\.weight has shape \[256, 320\].* \[4, 256, 320\]"),
        ("output_linear", lambda t: None, r"tensor .*output_linear\.weight \[4, 256, 320\] is missing"),
        ("router.layer", lambda t: t[1:], r"router\.layer\.weight has shape \[3, 256\].* \[4, 256\]"),
        ("input_linear", lambda t: t * float("nan"), r"experts\.0\.gate_proj\.weight\[0, 0\] is nan"),
    ],
)
def test_fused_experts_that_do_not_suit_are_refused(tmp_path: Path, name: str, change: Any, message: str) -> None:
    folder = write_source(tmp_path / "source", **SIZES["granite-moe"])
    stored = f"model.layers.1.block_sparse_moe.{name}.weight"
    changed = change(load_file(folder / FILE)[stored])
    edit_tensors(folder, {stored: None if changed is None else changed.contiguous()})
    with pytest.raises(ToolError, match=message):
        Source.open(folder).model(torch.float32)


def test_head_of_another_shape_is_refused(folder: Path) -> None:
    edit_tensors(folder, {"lm_head.weight": torch.zeros(8, 256)})
    refused(folder, rf"{FILE}: lm_head\.weight has shape \[8, 256\], config\.json asks for \[272, 256\]")


@pytest.mark.parametrize("name", ["lm_head.bias", "score.weight", "vision.rotary_emb.inv_freq", UP[:-6] + "lora_A"])
def test_tensor_that_nothing_uses_is_refused(folder: Path, name: str) -> None:
    edit_tensors(folder, {name: torch.ones(32)})
    refused(folder, rf"{FILE}: unexpected tensor {name}")


def test_adapters_and_gguf_files_are_named_for_what_they_are(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.Q4_0.gguf").touch()
    refused(tmp_path / "gguf", r"holds the GGUF file model\.Q4_0\.gguf; give the folder of safetensors files")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds a PEFT adapter; merge it into its base model")


@pytest.mark.parametrize("names", [["model-00001-of-00001"], ["model-00001-of-00002", "model-00002-of-00002"]])
def test_shards_without_their_index_are_refused_with_its_name(folder: Path, names: list[str]) -> None:
    (folder / FILE).rename(folder / f"{names[0]}.safetensors")
    for name in names[1:]:
        save_file({"model.norm.weight": torch.ones(256)}, folder / f"{name}.safetensors")
    refused(folder, rf"{INDEX_FILE} is missing, which lists {names[0]}\.safetensors \({len(names)} such shards\)")


def test_tensors_without_the_models_prefix_are_named(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / FILE)
    refused(folder, r"lack the prefix 'model\.' .*AutoModelForCausalLM")


def test_quantization_config_of_null_is_none(folder: Path) -> None:
    edit_config(folder, quantization_config=None)
    assert Source.open(folder).names
    with pytest.raises(FormatError, match="no quantization_config; run `infoquant quantize`"):
        Checkpoint(folder)
