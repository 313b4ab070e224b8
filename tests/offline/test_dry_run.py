"""`--dry-run` accounts for sizes, memory and time, from headers or from a config.json alone."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from offline import PRESETS, Report, ToolError, quantize
from offline.cli.main import app
from offline.dry_run import Plan
from offline.progress import silent
from offline.recipe import CalibrationSize, Psot
from tests.common.big import LAYER, LAYER_BYTES, LLAMA_3_8B
from tests.common.tiny import write_source

LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "vocab_size": 128_256,
}
DRY = {"calibration": "text.txt", "progress": silent, "dry_run": True}


@pytest.fixture(autouse=True)
def _as_a_tool_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds what the tests before have left."""
    monkeypatch.setattr("offline.dry_run.held_bytes", lambda: 6 * 10**8)


def config_alone(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def planned(report: Report) -> Plan:
    assert report.plan is not None
    return report.plan


def test_config_alone_gives_the_account_of_a_70b_model(tmp_path: Path) -> None:
    source = config_alone(tmp_path / "source", **LLAMA_3_70B)
    report = quantize(source, tmp_path / "out", **DRY)
    plan = planned(report)
    assert 70e9 < report.source_bytes / 2 < 71e9
    assert plan.layer_float32_bytes == 4 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    assert plan.sites["down"].hessian_bytes == 4 * 28672**2
    assert plan.memory_bytes < 0.2 * report.source_bytes
    assert plan.disk_bytes == report.total_bytes
    assert plan.shards >= report.total_bytes / 5e9
    assert {stage.name for stage in plan.stages} == {"rotation", "vocabulary and ends", "activations", "weights"}
    assert sorted(tmp_path.iterdir()) == [source]
    with pytest.raises(ToolError, match="no tokenizer"):
        quantize(source, tmp_path / "out", calibration="text.txt", progress=silent)


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
    assert many.seconds > 4 * few.seconds


def test_what_whole_models_need_is_told(tmp_path: Path) -> None:
    source = config_alone(tmp_path / "source", **LLAMA_3_8B, num_hidden_layers=32)
    plan = planned(quantize(source, tmp_path / "out", preset="best", progress=silent, dry_run=True))
    stages = {stage.name: stage.memory_bytes for stage in plan.stages}
    assert stages["calibration text"] > 2 * 32 * LAYER_BYTES
    assert stages["distillation"] > 2 * 32 * LAYER_BYTES
    assert stages["weights"] < plan.memory_bound_bytes


def test_tables_name_sites_stages_and_sums(tmp_path: Path) -> None:
    source = config_alone(tmp_path / "source", **LLAMA_3_8B, num_hidden_layers=2)
    arguments = ["quantize", source, tmp_path / "out", "--preset", "rtn", "--dry-run", "--shard-size", "0.2"]
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.stderr
    for wanted in ("each of 2 decoder layers", "28672 x 4096", "in all", "2 shards"):
        assert wanted in shown.stdout


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_the_time_foretold_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """In seconds of this process, of which a busy machine takes none away; shapes of SmolLM2, three layers."""
    monkeypatch.setattr("offline.rates.time", SimpleNamespace(perf_counter=time.process_time))
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    source = write_source(tmp_path / "source", num_hidden_layers=3, dtype=torch.bfloat16, **sizes)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The number {n} is followed by {n + 1}.\n" for n in range(3000)))
    recipe = PRESETS[preset]
    size = {"calibration": CalibrationSize(sequences=12, sequence_length=512), "psot": Psot(steps=60, pool_tokens=4000)}
    if recipe.distillation is not None:
        size["distillation"] = recipe.distillation.model_copy(update={"steps": 4})
    given = {"recipe": recipe.model_copy(update=size), "calibration": str(text), "progress": silent}
    foretold = planned(quantize(source, tmp_path / "out", dry_run=True, **given)).seconds
    began = time.process_time()
    quantize(source, tmp_path / "out", **given)
    taken = time.process_time() - began
    print(f"{preset}: {foretold:.1f} seconds foretold, {taken:.1f} taken")
    assert foretold / 1.5 < taken < 1.5 * foretold
