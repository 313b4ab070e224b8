"""`--dry-run` predicts sizes and memory, from headers or from a config.json alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from offline import Report, ToolError, quantize
from offline.cli.main import app
from offline.memory import Plan, sampling_dtype
from offline.progress import silent
from tests.common.big import LAYER, LAYER_BYTES, LLAMA_3_8B
from tests.common.real import REAL

LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "vocab_size": 128_256,
}
DRY = {"calibration": "text.txt", "progress": silent, "dry_run": True}


@pytest.fixture(autouse=True)
def _in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the memory of a fresh process: this one holds what earlier tests left."""
    monkeypatch.setattr("offline.memory.held_bytes", lambda: 6 * 10**8)


def config_alone(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(report: Report) -> Plan:
    assert report.plan is not None
    return report.plan


def test_config_alone_gives_sizes_and_memory_of_a_70b_model(tmp_path: Path) -> None:
    source = config_alone(tmp_path / "source", **LLAMA_3_70B)
    report = quantize(source, tmp_path / "out", **DRY)
    plan = planned(report)
    assert 70e9 < report.source_bytes / 2 < 71e9
    assert plan.layer_float32_bytes == 4 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    assert plan.sites["down"].hessian_bytes == 4 * 28672**2
    assert plan.memory_bytes < 0.2 * report.source_bytes
    assert plan.disk_bytes == report.total_bytes
    assert plan.shards >= report.total_bytes / 5e9
    assert {stage.name for stage in plan.stages} == {"rotation", "embeddings and lm_head", "activations", "weights"}
    assert sorted(tmp_path.iterdir()) == [source]
    with pytest.raises(ToolError, match="no tokenizer"):
        quantize(source, tmp_path / "out", calibration="text.txt", progress=silent)


@pytest.mark.parametrize("name", REAL)
def test_config_of_a_real_model_gives_its_parameters_within_the_bound(tmp_path: Path, name: str) -> None:
    parameters, config = REAL[name]
    report = quantize(config_alone(tmp_path / "source", **config), tmp_path / "out", **DRY)
    plan = planned(report)
    assert abs(report.source_bytes / 2 / parameters - 1) < 0.01
    assert report.linear_bytes < 0.26 * report.source_linear_bytes
    assert plan.memory_bytes <= plan.memory_bound_bytes


@pytest.mark.parametrize("preset", ["rtn", "quarot", "fast", "paper"])
def test_a_70b_model_stays_within_a_layer_and_a_batch(tmp_path: Path, preset: str) -> None:
    plan = planned(quantize(config_alone(tmp_path / "70b", **LLAMA_3_70B), tmp_path / "out", preset=preset, **DRY))
    assert plan.memory_bytes <= plan.memory_bound_bytes
    assert plan.memory_bound_bytes == int(1.5 * (plan.layer_float32_bytes + plan.batch_bytes)) + 2 * 2**30


def test_memory_grows_neither_with_layers_nor_much_with_the_preset(tmp_path: Path) -> None:
    few, many = (
        planned(
            quantize(
                config_alone(tmp_path / f"{layers}", **LLAMA_3_8B, num_hidden_layers=layers),
                tmp_path / "out",
                preset="quarot",
                **DRY,
            )
        )
        for layers in (2, 32)
    )
    assert few.layer_float32_bytes == LAYER_BYTES
    assert [few.sites["down"].rows, few.sites["down"].columns] == list(LAYER["mlp.down_proj"])
    assert many.memory_bytes - few.memory_bytes < 2**26
    assert many.memory_bytes <= many.memory_bound_bytes


QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}
OLMOE_1B_7B = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
MIXTURES = [(QWEN3_30B_A3B, 30.5e9), (MIXTRAL_8X7B, 46.7e9), (OLMOE_1B_7B, 6.92e9)]


@pytest.mark.parametrize(("config", "parameters"), MIXTURES)
def test_one_expert_of_a_mixture_is_in_memory(tmp_path: Path, config: dict[str, object], parameters: float) -> None:
    report = quantize(config_alone(tmp_path / "source", **config), tmp_path / "out", **DRY)
    plan = planned(report)
    assert report.source_bytes / 2 == pytest.approx(parameters, rel=0.01)
    assert plan.experts in (8, 64, 128)
    assert {"qkv", "o", "gate_up", "down"} == plan.sites.keys()
    one = 4 * sum(plan.sites[site].rows * plan.sites[site].columns for site in ("gate_up", "down"))
    attention = 4 * sum(plan.sites[site].rows * plan.sites[site].columns for site in ("qkv", "o"))
    assert plan.layer_float32_bytes == one + attention
    assert plan.memory_bytes < 0.2 * report.source_bytes
    assert plan.memory_bytes <= plan.memory_bound_bytes


def test_stages_that_hold_the_whole_model_say_so(tmp_path: Path) -> None:
    source = config_alone(tmp_path / "source", **LLAMA_3_8B, num_hidden_layers=32)
    plan = planned(quantize(source, tmp_path / "out", preset="best", progress=silent, dry_run=True))
    stages = {stage.name: stage.memory_bytes for stage in plan.stages}
    copies = 2 * 32 * LAYER_BYTES * sampling_dtype().itemsize // 4
    assert copies < stages["calibration text"] < 3 * copies
    assert stages["distillation"] > 2 * 32 * LAYER_BYTES
    assert stages["weights"] < plan.memory_bound_bytes


def test_tables_name_linears_stages_and_the_peak(tmp_path: Path) -> None:
    source = config_alone(tmp_path / "source", **LLAMA_3_8B, num_hidden_layers=2)
    arguments = ["quantize", source, tmp_path / "out", "--preset", "rtn", "--dry-run", "--shard-size", "0.2"]
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.stderr
    for wanted in ("each of 2 decoder layers", "28672 x 4096", "peak memory", "2 shards"):
        assert wanted in shown.stdout
