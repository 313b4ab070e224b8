"""What the programs of a GPU run share: arguments, rows written as they come, and the time that is left."""

import argparse
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import gpu_provenance

MARGIN_SECONDS = 5


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all programs of a run take."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{module}", description=doc)
    made.add_argument("--rows", type=Path, required=True, help="file to append JSON lines to")
    made.add_argument("--seconds", type=float, default=3600, help="time to stay within")
    made.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, nothing timed")
    return made


class Bench:
    """A program of a run; every row carries where it is from."""

    def __init__(self, stage: str, rows: Path, seconds: float, dry_run: bool):
        self.rows, self.seconds, self.dry_run = rows, seconds, dry_run
        self.began = time.monotonic()
        self.common = {"stage": stage, **gpu_provenance(seed=0)}
        rows.parent.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, stage: str, options: argparse.Namespace) -> "Bench":
        """Return the program for parsed arguments of `parser`."""
        return cls(stage, options.rows, options.seconds, options.dry_run)

    @property
    def device(self) -> str:
        """Return the device of the tensors."""
        return "cpu" if self.dry_run else "cuda"

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.began + self.seconds - time.monotonic()

    def row(self, **facts: Any) -> None:
        """Append a row to the file and print it."""
        print(" ".join(f"{name}={_short(value)}" for name, value in facts.items()), flush=True)
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.common | facts) + "\n")

    def attempt(self, measure: Callable[[], dict[str, Any]], **facts: Any) -> None:
        """Write a row of `facts` and what `measure` finds, or the problem that it met, or that no time was left."""
        if self.left() < MARGIN_SECONDS:
            self.row(**facts, skipped="no time left")
            return
        try:
            found = measure()
        except Exception as error:  # whatever it is, what comes next is still worth measuring
            traceback.print_exc(limit=4)
            found = {"problem": f"{type(error).__name__}: {error}"[:1000]}
        self.row(**facts, **found)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
