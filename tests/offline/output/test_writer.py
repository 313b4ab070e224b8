"""An output folder is whole or absent, whatever interrupts the run."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from infoquant_vllm.format import Checkpoint, FormatError
from offline import Recipe, ToolError, quantize
from offline.output.atomic import atomic_file
from offline.output.writer import check_space
from offline.progress import silent
from tests.common.tiny import write_source

QUANTIZE = """
import resource, sys, time
from offline import ToolError, quantize
source, output, limit, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def progress(stage, done, total, detail=""):
    print(stage, done, flush=True)
    time.sleep(pause)

try:
    quantize(source, output, preset="rtn", overwrite=True, progress=progress)
except ToolError as error:
    sys.exit(f"refused: {error}")
"""


def start(source: Path, output: Path, limit: int = 0, pause: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", QUANTIZE, str(source), str(output), str(limit), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def test_killed_run_leaves_no_folder_that_loads_and_keeps_the_old_one(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out" / "checkpoint"
    quantize(source, output, preset="rtn", progress=silent)
    before = (output / "config.json").stat().st_mtime_ns
    process = start(source, output, pause=60)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("layers 0")  # it is writing now, and pauses
    process.send_signal(signal.SIGKILL)
    process.wait()
    Checkpoint(output)
    assert (output / "config.json").stat().st_mtime_ns == before
    partial = [folder for folder in output.parent.iterdir() if folder != output]
    assert len(partial) == 1
    with pytest.raises(FormatError):
        Checkpoint(partial[0])


def test_full_disk_gives_a_message_and_leaves_nothing_behind(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out" / "checkpoint"
    process = start(source, output, limit=100_000)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "refused" in message
    assert str(output) in message
    assert "File too large" in message
    assert list(output.parent.iterdir()) == []


def test_disk_that_is_too_small_is_refused_before_anything_runs(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet" / "there", 1)
    with pytest.raises(ToolError, match="MB are needed"):
        check_space(tmp_path / "not" / "yet" / "there", 10**18)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_file_whose_writing_fails_stays_as_it_was_with_nothing_beside_it(
    tmp_path: Path, error: type[BaseException]
) -> None:
    file = tmp_path / "page.html"
    file.write_text("old")
    with pytest.raises((KeyboardInterrupt, ToolError)), atomic_file(file) as partial:  # noqa: PT012
        partial.write_text("half")
        raise error("interrupted")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_existing_output_is_refused_and_replaced_only_when_asked(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "checkpoint"
    quantize(source, output, preset="rtn", progress=silent)
    inode = output.stat().st_ino
    with pytest.raises(ToolError, match="exists already"):
        quantize(source, output, preset="rtn", progress=silent)
    assert output.stat().st_ino == inode
    quantize(source, output, preset="rtn", overwrite=True, progress=silent)
    assert output.stat().st_ino != inode
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["checkpoint", "source"]


def test_overwrite_replaces_nothing_but_checkpoints(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(ToolError, match="not a checkpoint of this tool"):
        quantize(source, output, preset="rtn", overwrite=True, progress=silent)
    with pytest.raises(ToolError, match="place of the source"):
        quantize(source, source, preset="rtn", overwrite=True, progress=silent)
    assert (output / "thesis.txt").read_text() == "years of work"


def test_failure_while_quantizing_leaves_nothing_behind(tmp_path: Path, source: Path) -> None:
    def fail(stage: str, done: int, total: int, detail: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", preset="rtn", progress=fail)
    assert [folder.name for folder in tmp_path.iterdir()] == ["source"]


def test_folder_has_tokenizer_card_recipe_and_report(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "out", preset="rtn", progress=silent)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    carried = {file.name for file in source.iterdir() if not file.name.endswith(".safetensors")}
    assert carried | {"README.md", "infoquant_recipe.yaml", "infoquant_report.json"} <= written
    assert "model.safetensors.index.json" in written


@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_permissions_follow_the_umask(tmp_path: Path, source: Path, transform: Literal["none", "hadamard"]) -> None:
    recipe = Recipe(name="test", transform=transform, rounding="rtn")
    mask = os.umask(0o022)
    try:
        quantize(source, tmp_path / "out", recipe=recipe, progress=silent)
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    modes = {(file.is_dir(), file.stat().st_mode & 0o777) for file in (tmp_path / "out").rglob("*")}
    assert modes == {(False, 0o644), (True, 0o755)}
