"""Progress of a long run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

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
