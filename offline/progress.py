"""Report the progress of a long run: bars on a terminal, plain lines elsewhere, and a log for programs."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from offline.errors import ToolError

SECONDS_BETWEEN_LINES = 10.0


class ProgressReport(Protocol):
    """The function that a run calls while it works."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Report that `stage` has done `done` of `total` steps; `detail` describes the last one."""


def silent(stage: str, done: int, total: int, detail: str = "") -> None:
    """Report nothing."""


def both(first: ProgressReport, second: ProgressReport) -> ProgressReport:
    """Report to two places."""

    def report(stage: str, done: int, total: int, detail: str = "") -> None:
        first(stage, done, total, detail)
        second(stage, done, total, detail)

    return report


@contextmanager
def console_progress() -> Iterator[ProgressReport]:
    """Report to standard error, so that standard output stays free for results."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console) as bars:
        yield _Bars(bars)


class Pace:
    """Estimate the time left of a stage from the steps done so far, from its first step on."""

    def __init__(self) -> None:
        self._stage, self._done, self._first = "", 0, 0
        self._last = self._began = time.monotonic()

    def seconds_left(self, stage: str, done: int, total: int) -> float | None:
        """Return the seconds left, None before the first step.

        A report that repeats the count restarts the clock: the steps before it were not computed now.
        """
        now = time.monotonic()
        if stage != self._stage:
            self._began, self._first = self._last, max(0, done - 1)
        elif done <= self._done:
            self._began, self._first = now, done
        self._stage, self._done, self._last = stage, done, now
        steps = done - self._first
        return (now - self._began) / steps * (total - done) if steps else None


class _Bars:
    def __init__(self, bars: Progress):
        self._bars, self._pace = bars, Pace()
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        left = _words(self._pace.seconds_left(stage, done, total))
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, detail="", left="")
        self._bars.update(self._tasks[stage], completed=done, total=total, detail=detail, left=left)


class _Lines:
    """One line when a stage begins and ends, and every few seconds in between."""

    def __init__(self) -> None:
        self._stage, self._printed, self._pace = "", 0.0, Pace()

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        now, left = time.monotonic(), self._pace.seconds_left(stage, done, total)
        if stage == self._stage and done < total and now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._stage, self._printed = stage, now
        words = [f"{stage} {done}/{total}", _words(left), detail]
        print(", ".join(word for word in words if word), file=sys.stderr, flush=True)


def _words(left: float | None) -> str:
    return f"{timedelta(seconds=round(left))} left" if left else ""


class JsonLog:
    """A file with one JSON object a line, written at once, from which programs follow a run.

    Every line has `time` (seconds since the epoch), `memory_bytes` (held by the process now) and `event`: "progress"
    with stage, done, total, seconds_left and detail, or the event and fields given to `write`.
    """

    def __init__(self, file: Path):
        try:
            self._file = file.open("a", encoding="utf-8")
        except OSError as error:
            raise ToolError(f"{file}: the log cannot be written ({error})") from None
        self._pace = Pace()

    def write(self, event: str, **fields: Any) -> None:
        """Write one line."""
        line = {"time": round(time.time(), 3), "event": event, "memory_bytes": held_bytes()} | fields
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Write a progress line (a `ProgressReport`)."""
        left = self._pace.seconds_left(stage, done, total)
        left = None if left is None else round(left, 1)
        self.write("progress", stage=stage, done=done, total=total, seconds_left=left, detail=detail)


def held_bytes() -> int:
    """Return the main memory that the process holds now."""
    held: int = psutil.Process().memory_info().rss
    return held
