"""The benchmarks that make bench runs: what their rows say, other formats, and random models."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from benchmarks import shapes
from benchmarks.common import interleaved
from benchmarks.common.models import ROOT
from benchmarks.readme import RESULTS
from benchmarks.shapes import write
from benchmarks.speed import baselines, linear, suite
from benchmarks.speed.memory import compare, held_bytes
from benchmarks.speed.serving import Case, case, spread, turn_order
from infoquant_vllm.format import ModelShape, expected_tensors, parse_config


def test_a_case_says_what_counts_and_gains_are_never_below_zero() -> None:
    decode, prefill = case("64:32:8"), case("1024:1:1")
    assert decode == Case(64, 32, 8)
    assert decode.gain({"tokens_per_s": 30.0}, {"tokens_per_s": 20.0}) == 1.5
    assert prefill.gain({"median_ttft_ms": 100.0}, {"median_ttft_ms": 250.0}) == 2.5
    with pytest.raises(ValueError, match="invalid literal"):
        case("64:x:1")
    with pytest.raises(TypeError):
        case("64:1")


def test_the_suite_runs_commands_that_exist_and_prints_their_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    for name in ("source_model", "quantized", "_baseline"):
        monkeypatch.setattr(suite, name, lambda *_: Path("model"))
    monkeypatch.setattr(suite.subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr("sys.argv", ["suite", "--results", str(tmp_path)])
    (tmp_path / "memory.json").write_text((RESULTS / "memory.json").read_text())
    suite.main()
    assert all(importlib.util.find_spec(command[2]) for command in commands)
    files = {Path(command[-1]).name for command in commands}
    assert {"serving.json", "linear.json", "attention.json", "memory.json"} <= files
    assert "| KV tokens in 1 GiB |" in capsys.readouterr().out


def test_every_server_begins_a_round_in_turn() -> None:
    assert [turn_order(3, number) for number in range(3)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    assert spread([1.5, 1.2, 2.0]) == {"times_as_fast": 1.5, "lowest": 1.2, "highest": 2.0}


def test_linears_of_a_layer_are_summed_over_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "CACHE_BYTES", 2**16)
    monkeypatch.setattr(linear, "MODELS", {"tiny": {"qkv": (64, 96), "down": (128, 64)}})
    rows = linear.layer("tiny", [3], seconds=0)
    assert [row["candidate"] for row in rows][1:3] == ["vLLM W8A8", "vLLM W4A16"]
    assert {"W4A4 (fast)", "W4A16 in groups"} <= {row["candidate"] for row in rows}
    assert all(row["median_us"] == pytest.approx(sum(row["sites_us"].values()), abs=0.2) for row in rows)
    assert rows[0]["times_as_fast"] == 1


@pytest.fixture
def tiny_source(tmp_path: Path) -> Path:
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    write(config, tmp_path / "source")
    return tmp_path / "source"


def test_the_tokenizer_of_a_random_model_decodes_any_token(tiny_source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_source)
    ids = [3, 63, 17, 2]
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids
    assert json.loads((tiny_source / "config.json").read_text())["vocab_size"] == 64


def test_a_shape_without_weights_is_written_without_transformers() -> None:
    code = "import sys, benchmarks.shapes; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("preset", ["none", "fast"])
@pytest.mark.parametrize("name", ["llama-3-70b", "qwen2-1.5b"])
def test_a_shape_is_a_config_and_a_tokenizer_without_weights(
    name: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["shapes", name, str(tmp_path / "shape"), "--preset", preset])
    shapes.main()
    assert {file.name for file in (tmp_path / "shape").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config, wanted = json.loads((tmp_path / "shape" / "config.json").read_text()), shapes.SHAPES[name]
    shape = ModelShape.from_hf(config)
    assert (shape.hidden_size, shape.vocab_size) == (wanted["hidden_size"], wanted["vocab_size"])
    assert shape.tie_word_embeddings == wanted["tie_word_embeddings"]
    assert config["rope_parameters"]["rope_theta"] == wanted["rope_parameters"]["rope_theta"]
    assert LlamaConfig(**wanted).to_dict().items() >= wanted.items()  # transformers knows them all
    if preset == "none":
        assert "quantization_config" not in config
    else:
        tensors = expected_tensors(parse_config(config["quantization_config"]), shape)
        rotated = "model.embed_tokens.r1" in tensors
        assert rotated == shape.tie_word_embeddings


@pytest.mark.parametrize("name", baselines.FORMATS)
def test_other_formats_hold_the_weights_to_half_a_step(name: str, tiny_source: Path, tmp_path: Path) -> None:
    baselines.convert(name, tiny_source, tmp_path / "out")
    plain, found = (load_file(folder / "model.safetensors") for folder in (tiny_source, tmp_path / "out"))
    module = "model.layers.0.mlp.down_proj"
    weight, scale = plain[f"{module}.weight"].float(), found[f"{module}.weight_scale"].float()
    if name == "w8a8":
        codes = found[f"{module}.weight"].float()
    else:
        words = found[f"{module}.weight_packed"]
        codes = ((words[:, :, None] >> torch.arange(0, 32, 4)) & 15).flatten(1).float() - 8
        scale = scale.repeat_interleave(baselines.GROUP, 1)
        assert found[f"{module}.weight_shape"].tolist() == list(weight.shape)
    assert ((codes * scale - weight).abs() <= scale * 0.501).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "model.embed_tokens.weight" in found


def test_a_model_of_several_shards_gets_an_index(tiny_source: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_source / "model.safetensors")
    names = sorted(tensors)
    (tiny_source / "model.safetensors").unlink()
    for number, part in enumerate((names[:3], names[3:]), start=1):
        save_file({each: tensors[each] for each in part}, tiny_source / f"model-0000{number}-of-00002.safetensors")
    baselines.convert("w8a8", tiny_source, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["model.layers.0.mlp.down_proj.weight_scale"].endswith(".safetensors")
    assert len(set(index.values())) == 2


def test_shared_storage_counts_once_and_lists_of_tensors_count() -> None:
    module = torch.nn.Linear(4, 8, bias=False)
    module.register_buffer("again", module.weight.data)
    module.listed = [torch.zeros(3), torch.zeros(5)]
    assert held_bytes(module) == 4 * (32 + 3 + 5)


def test_memory_is_compared_with_the_first_model() -> None:
    rows = [
        {"weight_bytes": 100, "kv_tokens": 10, "peak_bytes": 50},
        {"weight_bytes": 40, "kv_tokens": 36, "peak_bytes": 45},
    ]
    ratios = {name: value for name, value in compare(rows)[1].items() if name.endswith("_first")}
    assert ratios == {"weights_over_first": 0.4, "kv_tokens_over_first": 3.6, "peak_over_first": 0.9}
