"""What of the GPU's benchmarks runs without one: the checks, interpreted; the commands; rows of what fails."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import kernels, served
from tests.interpreted import kv4_attention, kv4_store


def test_checks_pass_and_rows_name_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (kernels.kv4_store, kernels.kv4_attention) == (kv4_store, kv4_attention)
    for case in kernels.SMALL:
        for row in kernels.measure(case, "cpu"):
            assert row["right"], row
            assert row["device"]
            assert {"torch", "triton", "vllm", "cuda"} <= set(row["versions"])
    monkeypatch.setattr(kv4_store, "kv_store", lambda *arguments: None)
    assert not kernels.measure(kernels.SMALL[0], "cpu")[0]["right"]


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
    found = served.formats(tmp_path / "bf16", tmp_path / "codes", tmp_path / "w4a16")
    rows = {name: served.measure(name, arguments, "decode") for name, arguments in found.items()}
    assert rows["W4A4KV4"]["tokens_per_second"] == 640
    assert rows["FP8"]["problem"] == "no FP8 here"
    assert all(row["device"] == "a GPU" for row in rows.values())
    assert commands[-1][4] == str(tmp_path / "w4a16")


def test_the_script_is_one_that_bash_reads() -> None:
    subprocess.run(["bash", "-n", str(Path(kernels.__file__).with_name("run.sh"))], check=True)
