"""Measure time and peak memory of `infoquant quantize` by the size of the model, on random models.

A row is one model and preset, in its own process. Calibration text is given, so that sampling it takes no time. The
peak is that of the whole process, including torch and transformers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from benchmarks.common.programs import INFOQUANT
from benchmarks.common.provenance import provenance, write_rows
from benchmarks.shapes import write

LAYERS = 6
SIZES = (256, 384, 512, 768)  # hidden sizes
VOCABULARY = 4096


def main() -> None:
    """Measure, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.quantize", description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["quarot", "fast"])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="hidden sizes")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    rows = [row for size in options.sizes for row in measure(size, options.presets)]
    Console().print(table(rows))
    if options.json:
        write_rows(rows, options.json)


def measure(size: int, presets: list[str]) -> list[dict[str, Any]]:
    """Return a row per preset, for a model with LAYERS layers and this hidden size."""
    config = LlamaConfig(
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=LAYERS,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 128,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        source, text = Path(scratch) / "source", Path(scratch) / "text.txt"
        write(config, source)
        text.write_text(" ".join(f"w{index * 7 % VOCABULARY}" for index in range(100_000)))
        return [_row(source, text, preset, size) for preset in presets]


def _row(source: Path, text: Path, preset: str, size: int) -> dict[str, Any]:
    output = source.with_name(preset)
    command = [*INFOQUANT, "quantize", str(source), str(output)]
    done = subprocess.run(
        [*command, "--preset", preset, "--calibration", str(text)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"infoquant quantize of a model of hidden size {size} failed:\n{done.stderr[-4000:]}")
    report = json.loads((output / "infoquant_report.json").read_text())
    return {
        "preset": preset,
        "hidden_size": size,
        "weights": report["source_linear_bytes"] // 2,
        "seconds": sum(report["seconds"].values()),
        "seconds_of": report["seconds"],
        "peak_bytes": report["peak_memory_bytes"],
        **provenance(0),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Format the rows for a terminal."""
    printed = Table(title=f"infoquant quantize, models of {LAYERS} layers")
    for heading in ("preset", "hidden size", "weights, million", "seconds", "per million weights", "peak, MB"):
        printed.add_column(heading, justify="right")
    for row in rows:
        millions = row["weights"] / 1e6
        numbers = f"{millions:.1f}", f"{row['seconds']:.1f}", f"{row['seconds'] / millions:.2f}"
        printed.add_row(row["preset"], str(row["hidden_size"]), *numbers, f"{row['peak_bytes'] / 1e6:.0f}")
    return printed


if __name__ == "__main__":
    main()
