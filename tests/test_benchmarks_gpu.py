"""What of the GPU's benchmarks runs without one: the checks, interpreted; the commands; rows of what fails."""

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import kernels, linears, served, tune
from tests.checkpoints import write_random
from tests.interpreted import configurations, int4_linear, kv4_attention, kv4_store, weights


def test_checks_pass_and_rows_name_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (kernels.kv4_store, kernels.kv4_attention) == (kv4_store, kv4_attention)
    for case in kernels.SMALL:
        for row in kernels.measure(case, "cpu"):
            assert row["right"], row
            assert row["device"]
            assert {"torch", "triton", "vllm", "cuda"} <= set(row["versions"])
    for product in kernels.SMALL_PRODUCTS:
        assert [row["right"] for row in kernels.measure_product(product, "cpu")] == [True, True]
    monkeypatch.setattr(kv4_store, "kv_store", lambda *arguments: None)
    assert not kernels.measure(kernels.SMALL[0], "cpu")[0]["right"]


def test_a_wrong_product_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = int4_linear.int4_linear
    monkeypatch.setattr(kernels.triton_linear, "int4_linear", lambda *a, **k: 1.05 * right(*a, **k))
    assert [row["right"] for row in kernels.measure_product(kernels.SMALL_PRODUCTS[0], "cpu")] == [False, False]


def test_every_format_is_a_layer_of_vllms_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with linears.one_worker("cpu"):
        found = {name: linears.measure(name, linears.SMALL, "cpu") for name in linears.formats(linears.SMALL)}
        assert found["W4A4 (fast)"][0]["kernel"] == "InfoQuantLinearMethod"
        assert [row["tokens"] for row in found["bf16"]] == list(linears.TOKENS)
        assert "problem" in found["FP8"][0]  # which is not for CPUs
        monkeypatch.setattr(linears, "make", lambda *_: 1 / 0)
        (row,) = linears.measure("bf16", linears.SMALL, "cpu")
        assert row["problem"] == "ZeroDivisionError: division by zero"


def test_the_fastest_right_tile_is_what_the_table_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOKENS", (2,))
    monkeypatch.setattr(tune, "FEW", tune.FEW[:4])
    times = itertools.count(1000, -1)
    monkeypatch.setattr(tune, "milliseconds", lambda call: next(times))
    monkeypatch.setattr(tune.torch, "device", lambda _: torch.empty(0).device)
    checkpoint, file = write_random(tmp_path / "checkpoint"), tmp_path / "tiles.json"
    monkeypatch.setattr("sys.argv", ["tune", str(checkpoint), "--output", str(file)])
    tune.main()
    (entry, *_) = configurations.measured(str(file))
    monkeypatch.setenv(configurations.TILES, str(file))
    shape = weights.layout(entry.features, entry.features // (entry.group_size or entry.features), 4)
    assert configurations.linear_tile(entry.arch, 1, entry.channels, shape, False) == entry.tile
    assert entry.tile == list(tune.candidates(2, shape))[-1]  # the fastest, as it was the last


def test_a_tile_with_other_results_ends_the_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = tune.Linear(128, 32, 1, 1, True, 4)
    monkeypatch.setattr(tune, "milliseconds", lambda call: 1.0)
    monkeypatch.setattr(
        tune.Linear, "product", lambda *_: lambda tile: torch.full((1,), float(tile.block_n + tile.stages))
    )
    with pytest.raises(ValueError, match="are not those of"):
        tune.best(linear, 1, torch.device("cpu"))


def test_a_row_holds_figures_or_what_vllm_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "fp8" in command:
            return subprocess.CompletedProcess(command, 1, "", "no FP8 here")
        figures = {"requests_per_second": 1.0, "tokens_per_second": 640.0, "elapsed_time": 1.0}
        Path(command[command.index("--output-json") + 1]).write_text(json.dumps(figures))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(served.subprocess, "run", run)
    monkeypatch.setattr(served, "device_provenance", lambda: {"device": "a GPU"})
    found = served.formats(tmp_path / "bf16", tmp_path / "codes", tmp_path / "w4a16", tmp_path / "w4a4")
    rows = {name: served.measure(name, arguments, "decode") for name, arguments in found.items()}
    assert rows["W4A4KV4"]["tokens_per_second"] == 640
    assert rows["FP8"]["problem"] == "no FP8 here"
    assert all(row["device"] == "a GPU" for row in rows.values())
    assert commands[-1][4] == str(tmp_path / "w4a4")


def test_the_script_is_one_that_bash_reads() -> None:
    subprocess.run(["bash", "-n", str(Path(kernels.__file__).with_name("run.sh"))], check=True)
