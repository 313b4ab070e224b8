"""Every row says where it is from, also on a machine without git, packages or nvidia-smi."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from benchmarks.common import provenance


@pytest.fixture
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without git, nvidia-smi and packages, whose torch does not know a CPU's instructions."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(provenance, "version", missing)
    monkeypatch.delattr("torch.cpu.get_capabilities")


def test_a_checkout_records_its_commit_and_versions() -> None:
    found = provenance.gpu_provenance(seed=3)
    assert found["seed"] == 3
    assert found["device"]
    assert {"torch", "triton", "vllm", "cuda", "infoquant-vllm"} <= set(found["versions"])
    assert found["versions"]["torch"]


@pytest.mark.usefixtures("_bare")
def test_an_unknown_fact_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "PACKED_COMMIT", tmp_path / "commit")
    found = provenance.gpu_provenance(seed=0)
    assert found["commit"] == "unknown"
    assert found["driver"] is None
    assert found["instructions"] is None
    assert found["device"]
    assert {found["versions"][name] for name in (*provenance.PACKAGES, "triton")} == {None}


@pytest.mark.usefixtures("_bare")
def test_without_git_the_commit_is_the_packed_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed = tmp_path / "commit"
    packed.write_text("0123abc\n")
    monkeypatch.setattr(provenance, "PACKED_COMMIT", packed)
    assert provenance.provenance(seed=0)["commit"] == "0123abc"


def test_a_gpu_is_named_with_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "NVIDIA H100 80GB HBM3, 580.159.04\nNVIDIA H100 80GB HBM3, 580.159.04"
    monkeypatch.setattr(provenance, "_output_of", lambda *command: said if command[0] == "nvidia-smi" else None)
    found = provenance.gpu_provenance(seed=0)
    assert (found["device"], found["driver"]) == ("NVIDIA H100 80GB HBM3", "580.159.04")


def test_a_result_file_is_json_with_a_row_per_line(tmp_path: Path) -> None:
    file, rows = tmp_path / "folder" / "rows.json", [{"a": [1, 2]}, {"a": []}]
    provenance.write_rows(rows, file)
    assert json.loads(file.read_text()) == rows
    assert len(file.read_text().splitlines()) == 4
