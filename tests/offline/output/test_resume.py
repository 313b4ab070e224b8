"""`--resume`: a run killed at any moment resumes and writes the bytes of an uninterrupted one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offline import PRESETS, ToolError, quantize
from offline.output.resume import BLOCK, hash_file, resume_folder
from offline.progress import silent
from offline.recipe import CalibrationSize, Distillation, LearnedClips, Psot, PsotLayer, Recipe
from tests.common.tiny import write_source

KILLS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from offline import quantize
from offline.progress import silent

source, folder, recipe, text, kills = sys.argv[1:]
draw, left = random.Random(recipe), int(kills)

def start(output, **options):
    child = os.fork()
    if child == 0:
        try:
            quantize(source, output, recipe=recipe, calibration=text, progress=silent, **options)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return child

began = time.monotonic()
assert os.waitpid(start(f"{folder}/expected/out"), 0)[1] == 0
whole, number = time.monotonic() - began, 0
while left:
    number += 1
    output, kept = Path(folder, str(number), "out"), Path(folder, str(number), "out.resume")
    while True:
        child = start(output, resume=True)
        if left:
            time.sleep(draw.uniform(0, 0.6 * whole))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        left -= os.WIFSIGNALED(status)
        if status == 0 or (output.exists() and not kept.exists()):  # or killed when all was done
            break
print(number)
"""
"""Program that forks a child for each run, so that torch is imported once."""
TEXT = "".join(f"The number {n} is followed by {n + 1}, and its square is {n * n}.\n\n" for n in range(300))
MEASURED = ("seconds", "peak_memory_bytes")
STEPS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {"psot_layer": PsotLayer(epochs=1), "learned_clips": LearnedClips(sequences=1, epochs=2)},
    "best": {"distillation": Distillation(steps=2, warmup_steps=1)},
}


def small(preset: str) -> Recipe:
    update = {"calibration": CalibrationSize(sequences=4, sequence_length=64), "psot": Psot(steps=60)}
    return PRESETS[preset].model_copy(update=update | STEPS[preset])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return write_source(tmp_path / "source", num_hidden_layers=4)


def contents(folder: Path) -> dict[str, Any]:
    """Return the content of every file, the report without times and memory."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    found: dict[str, Any] = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    report = json.loads(found["infoquant_report.json"])
    return found | {"infoquant_report.json": {name: report[name] for name in report if name not in MEASURED}}


@pytest.mark.parametrize(("preset", "kills"), [("paper", 7), ("best", 7)])
def test_run_killed_at_random_moments_writes_the_bytes_of_an_uninterrupted_one(
    tmp_path: Path, source: Path, preset: str, kills: int
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small(preset).dump())
    command = [sys.executable, "-c", KILLS, source, tmp_path, recipe, tmp_path / "text.txt", str(kills)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = contents(tmp_path / "expected" / "out")
    for number in range(1, int(done.stdout) + 1):
        assert contents(tmp_path / str(number) / "out") == expected
        assert [file.name for file in (tmp_path / str(number)).iterdir()] == ["out"]


def stop_at(wanted: str, layer: int) -> Any:
    def progress(stage: str, done: int, total: int, detail: str = "") -> None:
        if (stage, done) == (wanted, layer):
            raise KeyboardInterrupt

    return progress


def begin(tmp_path: Path, source: Path, **changes: Any) -> None:
    """Run until the second layer is done; with `changes` resume from there."""
    arguments: dict[str, Any] = {"recipe": small("fast"), "calibration": str(tmp_path / "text.txt"), "resume": True}
    quantize(source, tmp_path / "out", **(arguments | {"progress": stop_at("layers", 2)} | changes))


def test_finished_layers_are_not_computed_again(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, source)
    assert not (tmp_path / "out").exists()
    computed: list[int] = []
    from offline.stages import quantize_layers as layers

    once = layers._quantized_layer
    monkeypatch.setattr(layers, "_quantized_layer", lambda *args: computed.append(args[2]) or once(*args))
    begin(tmp_path, source, progress=silent)
    assert computed == [2, 3]
    assert not resume_folder(tmp_path / "out").exists()


def test_learning_of_the_rotation_resumes_from_the_saved_steps(tmp_path: Path, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, source, progress=stop_at("rotation", 55))
    steps: list[int] = []
    begin(tmp_path, source, progress=lambda stage, done, *_: steps.append(done) if stage == "rotation" else None)
    assert steps == list(range(51, 61))


def test_what_changed_is_named_and_nothing_is_lost(tmp_path: Path, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, source)
    config, text = source / "config.json", tmp_path / "text.txt"
    for changes, named in (
        ({"seed": 1}, "seed was 0, is 1"),
        ({"recipe": small("fast").model_copy(update={"equalize": False})}, "recipe: equalize was True, is False"),
        ({"calibration": "other.txt"}, "calibration: content of .* was"),
    ):
        with pytest.raises(ToolError, match=f"out.resume: belongs to a different run: .*{named}"):
            begin(tmp_path, source, **changes)
    for file, named in ((config, "model: config.json"), (text, "calibration: content")):
        before = file.read_text()
        file.write_text(before + "\n")
        with pytest.raises(ToolError, match=named):
            begin(tmp_path, source)
        file.write_text(before)
    begin(tmp_path, source, progress=silent)


def test_run_killed_after_its_output_was_in_place_is_finished(tmp_path: Path, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, source)
    kept = {file.name: file.read_bytes() for file in resume_folder(tmp_path / "out").iterdir() if file.is_file()}
    begin(tmp_path, source, progress=silent)
    expected = contents(tmp_path / "out")
    resume_folder(tmp_path / "out").mkdir()
    for name, data in (kept | {"done": b""}).items():
        (resume_folder(tmp_path / "out") / name).write_bytes(data)
    begin(tmp_path, source)
    assert contents(tmp_path / "out") == expected
    assert not resume_folder(tmp_path / "out").exists()
    with pytest.raises(ToolError, match="exists already"):
        begin(tmp_path, source)


def test_two_runs_cannot_use_one_folder(tmp_path: Path, source: Path) -> None:
    def second(stage: str, done: int, total: int, detail: str = "") -> None:
        begin(tmp_path, source)

    with pytest.raises(ToolError, match="another run uses it"):
        begin(tmp_path, source, progress=second)


def test_large_files_are_hashed_in_part_and_small_ones_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, data = tmp_path / "file", bytearray(8 * BLOCK)
    file.write_bytes(data)
    whole = hash_file(file)
    monkeypatch.setattr("offline.output.resume.HASHED_BYTES", 2 * BLOCK)
    part = hash_file(file)
    for place, seen in ((0, True), (BLOCK, False), (4 * BLOCK, True), (8 * BLOCK - 1, True)):
        changed = data.copy()
        changed[place] = 1
        file.write_bytes(changed)
        assert (hash_file(file) != part) == seen
        monkeypatch.setattr("offline.output.resume.HASHED_BYTES", 2**28)
        assert hash_file(file) != whole
        monkeypatch.setattr("offline.output.resume.HASHED_BYTES", 2 * BLOCK)
