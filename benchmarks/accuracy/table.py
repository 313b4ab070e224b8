"""Print the rows of accuracy.json, which `benchmarks.accuracy.run` writes, as one Markdown table."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]
Columns = dict[str, list[str]]
"""Cells by heading, one per row."""


def main() -> None:
    """Print one result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.table", description=__doc__)
    parser.add_argument("results", type=Path, help="accuracy.json")
    print(markdown(json.loads(parser.parse_args().results.read_text())), end="")


def markdown(rows: list[Row]) -> str:
    """Return one table of all columns, with notes below it."""
    columns = {"model": _names(rows)} | distances(rows) | task_scores(rows) | cost_figures(rows)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)]
    return "\n".join([*lines, "", *_notes(rows)]) + "\n"


def terminal_tables(rows: list[Row]) -> list[Table]:
    """Return the same columns as three tables, which fit a terminal."""
    titles = {"distance to the reference": distances, "tasks": task_scores, "costs": cost_figures}
    tables = []
    for title, of in titles.items():
        columns = {"model": _names(rows)} | of(rows)
        if len(columns) > 1:
            table = Table(*columns, title=title)
            for cells in zip(*columns.values(), strict=True):
                table.add_row(*cells)
            tables.append(table)
    return tables


def distances(rows: list[Row]) -> Columns:
    """Return the figures of the text; the first checkpoint is the baseline of the others' KL."""
    baseline = rows[1] if len(rows) > 1 else rows[0]
    return {
        "perplexity, served": [_figure(row, "perplexity", 2) for row in rows],
        "top-1 agreement, served": [_figure(row, "top1_agreement") for row in rows],
        f"KL ≥, served, top-{rows[0]['top']} tokens": [_figure(row, "kl_lower_bound") for row in rows],
        "KL, simulated, whole vocabulary": [_figure(row, "simulated_kl") for row in rows],
        f"KL below that of {baseline['model']}": [_saved(row, baseline) for row in rows],
    }


def task_scores(rows: list[Row]) -> Columns:
    """Return the figures of the tasks; no columns where no tasks were run."""
    done = next((row for row in rows if "tasks" in row), None)
    if done is None:
        return {}
    columns: Columns = {}
    for name, figures in done["tasks"].items():
        found = [row.get("tasks", {}).get(name, {}) for row in rows]
        columns[f"{name}, {figures['metric']}"] = [_figure(one, "score") for one in found]
        if figures["metric"] == "exact_match":
            columns[f"{name}, bits per byte"] = [_figure(one, "bits_per_byte", 2) for one in found]
    means = [row.get("task_mean", {}) for row in rows]
    columns["mean of the tasks"] = [_figure(one, "score") for one in means]
    columns["less the reference's"] = [_figure(one, "difference", sign="+") for one in means]
    return columns


def cost_figures(rows: list[Row]) -> Columns:
    """Return the figures of config and report."""
    return {
        "bits per weight": [_number(row.get("bits_per_weight"), ".2f") for row in rows],
        "multiply-adds added per token": [_added(row) for row in rows],
        "quantizing, s": [_number(row.get("quantizing_seconds"), ",.0f") for row in rows],
        "peak memory, GiB": [_number(row.get("peak_memory_bytes"), ".2f", 2**30) for row in rows],
    }


def _names(rows: list[Row]) -> list[str]:
    return [row["model"] + (f" (failed: {row['failed']})" if "failed" in row else "") for row in rows]


def _figure(row: Row, name: str, digits: int = 3, sign: str = "") -> str:
    """Format mean ± standard error; a dash where the row has no such figure."""
    if row.get(name) is None:
        return "-"
    digits = 0 if abs(row[name]) >= 1000 else digits
    return f"{row[name]:{sign}.{digits}f} ± {row[f'{name}_se']:.{digits}f}"


def _saved(row: Row, baseline: Row) -> str:
    if row is baseline or "simulated_kl" not in row or "simulated_kl" not in baseline:
        return "-"
    return f"{1 - row['simulated_kl'] / baseline['simulated_kl']:.1%}"


def _number(value: float | None, spec: str, unit: int = 1) -> str:
    return "-" if value is None else format(value / unit, spec)


def _added(row: Row) -> str:
    if "multiply_adds_added" not in row:
        return "-"
    added = row["multiply_adds_added"]
    return f"{added:,} ({added / row['multiply_adds']:.1%})"


def _notes(rows: list[Row]) -> list[str]:
    first = rows[0]
    notes = [
        f"± is one standard error. The first model is the reference. Text: {first['tokens']:,} tokens of "
        f"{first['text']} in windows of {first['window']} (errors over windows). KL in nats per token: *served* is a "
        f"lower bound, which counts all but the top-{first['top']} tokens as one; *simulated* is the whole of it, "
        "computed by the tool's simulation of the server on the same windows.",
    ]
    if first["items"]:
        notes[0] += (
            " Tasks, served and scored by lm-eval: "
            + ", ".join(f"{count} items of {name}" for name, count in first["items"].items())
            + " (errors over items); acc compares log-likelihoods of the choices, acc_bytes those per byte, "
            "exact_match is whether greedy decoding gives the choice. The difference to the reference is over "
            "the same items."
        )
    notes[0] += (
        " Multiply-adds added while serving are per token and, in brackets, relative to the model's own in linears and "
        "lm_head."
    )
    return [*notes, "", f"Commit {first['commit']}, {first['device']}, {first['date'][:10]}, seed {first['seed']}."]


if __name__ == "__main__":
    main()
