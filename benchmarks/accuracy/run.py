"""Measure how far checkpoints are from the bf16 model they were made of, and what they cost.

Each model is served by `vllm serve` in turn. Over the OpenAI API it scores the same windows of text (perplexity,
top-1 agreement, and a lower bound of the KL divergence, which counts the top-k tokens of both models singly and all
others as one), and lm-eval runs the same items of tasks. The KL divergence over the whole vocabulary comes from the
simulation, on the same windows. Costs come from each checkpoint's config and report. accuracy.json and accuracy.md are
written to --output after each model.
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

from benchmarks.accuracy.costs import costs
from benchmarks.accuracy.figures import task_figures, text_figures
from benchmarks.accuracy.scores import Scores, score
from benchmarks.accuracy.simulation import WholeVocabulary
from benchmarks.accuracy.table import markdown, terminal_tables
from benchmarks.accuracy.tasks import MAX_TOKENS, Task, TaskScores, evaluate, read_task, served_model
from benchmarks.common.provenance import provenance, write_rows, write_whole
from benchmarks.common.server import serve, stop_on_sigterm
from infoquant_vllm.format import read_json
from offline.model.source import Source
from offline.run import Stopwatch
from offline.text import text_windows


@dataclass
class Inputs:
    """What all models are measured on: windows int64 [windows, tokens], top-k of their scores, and tasks.

    max_tokens: longest prompt that a server must take.
    """

    windows: torch.Tensor
    top: int
    tasks: list[Task]
    max_tokens: int


@dataclass
class Served:
    """The scores of one served model, and the seconds per stage."""

    scores: Scores
    tasks: dict[str, TaskScores]
    watch: Stopwatch = field(default_factory=Stopwatch)


def main() -> None:
    """Measure all models, print tables, write --output; exit with 1 if a checkpoint failed, after the others."""
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
    """Draw windows and items by --seed; raises ToolError where files are wrong or too short."""
    count, tokenizer = options.tokens // options.window, reference.tokenizer()
    windows = text_windows(options.text, tokenizer, reference.shape.vocab_size, count, options.window, options.seed)
    tasks = [read_task(file, options.items, options.seed) for file in options.tasks]
    positions = read_json(options.reference / "config.json").get("max_position_embeddings", MAX_TOKENS)
    longest = min(MAX_TOKENS, positions) if tasks else 0
    return Inputs(windows, options.top, tasks, max(options.window + 1, longest))


def row(folder: Path, inputs: Inputs, reference: Served, whole: WholeVocabulary | None) -> dict[str, Any]:
    """Return all figures of a checkpoint, or of the reference itself where `whole` is None."""
    served = reference if whole is None else ask(folder, inputs)
    figures: dict[str, Any] = {**text_figures(None if whole is None else reference.scores, served.scores)}
    figures |= task_figures(served.tasks, None if whole is None else reference.tasks)
    if whole is not None:
        with served.watch("simulation"):
            kl = whole.kl(folder)
        figures |= {"simulated_kl": kl.mean, "simulated_kl_se": kl.standard_error}
    return figures | costs(folder) | {"measuring_seconds": served.watch.seconds}


def ask(folder: Path, inputs: Inputs) -> Served:
    """Serve a model, score the windows and the tasks, stop it."""
    limits = ("--max-model-len", str(inputs.max_tokens), "--max-logprobs", str(inputs.top))
    watch, began = Stopwatch(), time.monotonic()
    with (
        tempfile.TemporaryDirectory() as scratch,
        serve(folder, Path(scratch) / "server.log", "--enforce-eager", *limits) as server,
    ):
        watch.seconds["start"] = round(time.monotonic() - began, 2)
        with watch("text"):
            scores = score(server, inputs.windows, inputs.top)
        with watch("tasks"):
            tasks = evaluate(served_model(server, inputs.max_tokens), inputs.tasks) if inputs.tasks else {}
    return Served(scores, tasks, watch)


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
    parser.add_argument("--top", type=int, default=256, help="k of the top-k tokens that the KL bound counts singly")
    parser.add_argument("--tasks", type=Path, nargs="+", default=[], help="JSONL files with context, choices, label")
    parser.add_argument("--items", type=int, default=100, help="how many items of each task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of windows and items")
    parser.add_argument("--output", type=Path, help="folder to write the results to")
    options = parser.parse_args()
    if options.window < 2 or options.tokens < 2 * options.window:
        parser.error(
            f"--tokens {options.tokens} --window {options.window}: a standard error needs 2 windows of 2 tokens"
        )
    return options


if __name__ == "__main__":
    main()
