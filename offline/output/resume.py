"""The folder beside an output that an interrupted run goes on from."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from infoquant_vllm.format import read_json
from offline.errors import ToolError
from offline.output.fingerprint import differences
from offline.output.work import fsync
from offline.output.writer import move_into_place, not_written

FINGERPRINT = "fingerprint.json"
DONE = "done"


def work_folder(output: Path) -> Path:
    """Where the state of a run that writes `output` lies."""
    return output.with_name(f"{output.name}.resume")


def finished_before(output: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether a run of that fingerprint had moved its output into place when it was killed; then only tidies up."""
    folder = work_folder(output)
    if not (folder / DONE).is_file() or (folder / "partial").exists() or not output.is_dir():
        return False
    same = not differences(read_json(folder / FINGERPRINT), fingerprint)
    shutil.rmtree(folder)
    return same


@contextmanager
def resumable_folder(output: Path, fingerprint: dict[str, Any]) -> Iterator[Path]:
    """A folder for the block to write, which takes `output`'s place when it ends well.

    Whatever ends the block otherwise, what it saved in the work folder stays. Raises ToolError where that
    folder was begun with another fingerprint, or another run is at work in it.
    """
    folder = work_folder(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            _take(lock, folder)
            _check(folder, fingerprint)
            partial = folder / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            (folder / DONE).unlink(missing_ok=True)
            partial.mkdir()
            yield partial
            (folder / DONE).touch()
            fsync(folder)
            move_into_place(partial, output)
            shutil.rmtree(folder)
    except KeyboardInterrupt as error:
        error.add_note(f"{folder} keeps what is done; the same command with --resume goes on from there")
        raise
    except (OSError, SafetensorError) as error:
        raise not_written(output, error, f"; go on with --resume once mended, {folder} keeps what is done") from error


def _take(lock: Any, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ToolError(f"{folder}: another run is at work in it; wait for it, or choose another output") from None


def _check(folder: Path, fingerprint: dict[str, Any]) -> None:
    file = folder / FINGERPRINT
    if file.is_file():
        changed = differences(read_json(file), fingerprint)
        if changed:
            raise ToolError(
                f"{folder}: was begun otherwise and cannot be gone on from: {'; '.join(changed)}; "
                "set that back, or remove the folder to begin anew"
            )
        return
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(fingerprint, indent=2), encoding="utf-8")
    fsync(partial)
    partial.replace(file)
    fsync(folder)
