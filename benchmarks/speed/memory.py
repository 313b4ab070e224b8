"""What served models hold in memory: weights, tokens of the KV cache, and the worker's peak.

Each model is loaded by vLLM's own engine in a process of its own. Weights are all tensors that the model's
modules hold, each storage once, and those that oneDNN holds in their place in a layout of its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.provenance import provenance, write_rows
from benchmarks.common.server import vllm_environment

KV_GIB = 1
PROMPT_TOKENS = 512


def main() -> None:
    """Measure, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.memory", description=__doc__)
    parser.add_argument(
        "models", type=Path, nargs="+", help="folders of models; the others are compared with the first"
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    rows = compare([measure(model) for model in options.models])
    Console().print(table(rows))
    if options.json:
        write_rows(rows, options.json)


def measure(model: Path) -> dict[str, Any]:
    """The figures of one model, from a process of its own."""
    environment = vllm_environment(KV_GIB) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "benchmarks.speed.memory_worker", str(model)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{model} was not loaded, exit code {done.returncode}:\n{done.stderr[-4000:]}")
    return {"model": model.name} | json.loads(done.stdout.splitlines()[-1]) | provenance(0)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their ratios to the first."""
    names = {"weight_bytes": "weights_over_first", "kv_tokens": "kv_tokens_over_first", "peak_bytes": "peak_over_first"}
    return [row | {ratio: row[name] / rows[0][name] for name, ratio in names.items()} for row in rows]


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    printed = Table(title="What a worker holds")
    for heading in ("model", "weights, MB", "ratio", f"KV tokens in {KV_GIB} GiB", "ratio", "peak, MB", "ratio"):
        printed.add_column(heading, justify="right")
    for row in rows:
        printed.add_row(
            row["model"],
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['weights_over_first']:.3f}",
            f"{row['kv_tokens']:,}",
            f"{row['kv_tokens_over_first']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['peak_over_first']:.2f}",
        )
    return printed


if __name__ == "__main__":
    main()
