"""Checkpoints against the bf16 model they were made of: how far off they are, and what they cost.

Every model is served by `vllm serve` in turn. Over the OpenAI API it scores the same windows of text
(perplexity, top-1 agreement, and a lower bound of the KL divergence that counts the likeliest tokens
of both models one by one and the rest as one) and the same items of tasks. The KL divergence over
the whole vocabulary comes from the simulation, on the same windows. Costs come from each checkpoint's
config and report. Writes accuracy.json and accuracy.md into --output after every model.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.accuracy.figures import task_figures, text_figures
from benchmarks.accuracy.scores import Scores, score
from benchmarks.accuracy.simulation import WholeVocabulary
from benchmarks.accuracy.table import markdown, terminal_tables
from benchmarks.accuracy.tasks import Answer, Task, answer, read_task
from benchmarks.common.provenance import provenance, write_rows, write_whole
from benchmarks.common.server import serve, stop_on_sigterm
from benchmarks.speed.costs import costs
from offline.model.source import Source
from offline.output.report import Stopwatch
from offline.text import text_windows

CONCURRENT = 8
"""Requests in flight while tasks are scored. Windows, with their long lists, go one at a time."""


@dataclass
class Inputs:
    """What all models are measured on: windows int64 [windows, tokens], and tasks."""

    windows: torch.Tensor
    tasks: list[Task]
    top: int

    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max([self.windows.shape[1], *(task.longest() for task in self.tasks)])


@dataclass
class Served:
    """What one server said, and how long that took, in seconds by stage."""

    scores: Scores
    answers: dict[str, list[Answer]]
    watch: Stopwatch = field(default_factory=Stopwatch)


def main() -> None:
    """Measure, print tables, write --output. Exits with 1 where a checkpoint failed; the others are measured."""
    options = _options()
    stop_on_sigterm()
    inputs = read_inputs(options, Source.open(options.reference))
    common = {
        "text": Path(options.text).name,
        "tokens": inputs.windows.numel(),
        "window": options.window,
        "top": options.top,
        "items": {task.name: len(task.items) for task in inputs.tasks},
    }
    reference = ask(options.reference, inputs)
    whole = WholeVocabulary(options.reference, inputs.windows)
    rows: list[dict[str, Any]] = []
    for folder in [options.reference, *options.checkpoints]:
        try:
            found = row(folder, inputs, reference, None if folder == options.reference else whole)
        except Exception as error:  # one checkpoint that cannot be measured must not cost the others their results
            print(f"{folder.name}: {error}", file=sys.stderr)
            found = {"failed": type(error).__name__}
        rows.append({"model": folder.name, **found, **common, **provenance(options.seed)})
        if options.output:
            write(rows, options.output)
    for table in terminal_tables(rows):
        Console(width=150).print(table)
    sys.exit(1 if any("failed" in one for one in rows) else 0)


def read_inputs(options: argparse.Namespace, reference: Source) -> Inputs:
    """Windows and items, drawn by --seed; raises ToolError where files are wrong or too short."""
    count, tokenizer = options.tokens // options.window, reference.tokenizer()
    windows = text_windows(options.text, tokenizer, reference.shape.vocab_size, count, options.window, options.seed)
    return Inputs(
        windows, [read_task(file, tokenizer, options.items, options.seed) for file in options.tasks], options.top
    )


def row(folder: Path, inputs: Inputs, reference: Served, whole: WholeVocabulary | None) -> dict[str, Any]:
    """All figures of a checkpoint, or of the reference itself where `whole` is None."""
    served = reference if whole is None else ask(folder, inputs)
    figures: dict[str, Any] = {**text_figures(None if whole is None else reference.scores, served.scores)}
    figures |= task_figures(inputs.tasks, served.answers, None if whole is None else reference.answers)
    if whole is not None:
        with served.watch("simulation"):
            kl = whole.kl(folder)
        figures |= {"simulated_kl": kl.mean, "simulated_kl_se": kl.standard_error}
    return figures | costs(folder) | {"measuring_seconds": served.watch.seconds}


def ask(folder: Path, inputs: Inputs) -> Served:
    """Serve a model, score the windows and the tasks, stop it."""
    limits = ("--max-model-len", str(inputs.longest() + 1), "--max-logprobs", str(inputs.top))
    watch, began = Stopwatch(), time.monotonic()
    with (
        tempfile.TemporaryDirectory() as scratch,
        serve(folder, Path(scratch) / "server.log", "--enforce-eager", *limits) as server,
    ):
        watch.seconds["start"] = round(time.monotonic() - began, 2)
        with watch("text"):
            scores = score(server, inputs.windows, inputs.top)
        with watch("tasks"):
            answers = answer(server, inputs.tasks, CONCURRENT)
    return Served(scores, answers, watch)


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the rows so far as JSON and Markdown."""
    write_rows(rows, folder / "accuracy.json")
    write_whole(markdown(rows), folder / "accuracy.md")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.run", description=__doc__)
    parser.add_argument("reference", type=Path, help="folder of the unquantized model")
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders of InfoQuant checkpoints")
    parser.add_argument("--text", required=True, help="text or JSONL file to measure on, never calibrated on")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--top", type=int, default=256, help="how many of the likeliest tokens the bound counts singly")
    parser.add_argument("--tasks", type=Path, nargs="+", default=[], help="JSONL files: context, choices, label")
    parser.add_argument("--items", type=int, default=100, help="how many items of each task")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of windows and items")
    parser.add_argument("--output", type=Path, help="folder to write the results to")
    options = parser.parse_args()
    if options.window < 2 or options.tokens < 2 * options.window:
        parser.error(
            f"--tokens {options.tokens} --window {options.window}: a standard error needs 2 windows of 2 tokens"
        )
    return options


if __name__ == "__main__":
    main()
