"""Progress of a long run: a bar on a terminal, plain lines elsewhere, and a log for programs."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from offline.errors import ToolError

SECONDS_BETWEEN_LINES = 10.0


class ProgressReport(Protocol):
    """What the tool calls while it works."""

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """`stage` has done `done` of `total` steps; `detail` says what the last one gave."""


def silent(stage: str, done: int, total: int, detail: str = "") -> None:
    """Report nothing."""


@contextmanager
def console_progress() -> Iterator[ProgressReport]:
    """A report to standard error, so that standard output stays free for results."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console) as bars:
        yield _Bars(bars)


class _Bars:
    def __init__(self, bars: Progress):
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, detail="")
        self._bars.update(self._tasks[stage], completed=done, total=total, detail=detail)


class _Lines:
    """One line per stage begun and ended, and every few seconds in between."""

    def __init__(self) -> None:
        self._stage = ""
        self._began = self._printed = 0.0

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._printed = stage, now, -SECONDS_BETWEEN_LINES
        if done < total and now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        left = f", {(now - self._began) / done * (total - done):.0f} s left" if 0 < done < total else ""
        print(f"{stage} {done}/{total}{left}{f', {detail}' if detail else ''}", file=sys.stderr, flush=True)


class JsonLog:
    """A file of JSON objects, one a line, each written at once: what programs follow a run by.

    Every line has `time` (seconds since the epoch), `memory_bytes` (what the process holds now) and
    `event`: "progress" with stage, done, total, seconds_left and detail, or what `write` was given.
    """

    def __init__(self, file: Path):
        try:
            self._file = file.open("a", encoding="utf-8")
        except OSError as error:
            raise ToolError(f"{file}: the log cannot be written ({error})") from None
        self._stage, self._began, self._first = "", 0.0, 0

    def write(self, event: str, **fields: Any) -> None:
        """One line."""
        line = {"time": round(time.time(), 3), "event": event, "memory_bytes": held_bytes()} | fields
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """A `ProgressReport`."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first = stage, now, done
        pace = (now - self._began) / (done - self._first) if done > self._first else None
        left = None if pace is None else round(pace * (total - done), 1)
        self.write("progress", stage=stage, done=done, total=total, seconds_left=left, detail=detail)


def held_bytes() -> int:
    """The main memory that this process holds now."""
    held: int = psutil.Process().memory_info().rss
    return held


def both(first: ProgressReport, second: ProgressReport) -> ProgressReport:
    """Reports to two places."""

    def report(stage: str, done: int, total: int, detail: str = "") -> None:
        first(stage, done, total, detail)
        second(stage, done, total, detail)

    return report
