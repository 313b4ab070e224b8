"""`make bench`: run a short version of each speed and memory benchmark, and print the tables of the results.

The models are SmolLM2-135M-Instruct as it is, at W4A4KV4 (`fast`), and at W4A4KV4 with an 8-bit lm_head
(`random_weights.yaml`, rounded to nearest: its answers are bad, its speed is not). Memory is also measured in vLLM's
other integer formats, which take long to compile: serve them with `benchmarks.speed.serving`. Accuracy is not measured;
it needs texts and tasks that are not in the repository.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.common.models import DEMO, ROOT, quantized, source_model
from benchmarks.readme import RESULTS, tables
from benchmarks.speed import baselines

console = Console(highlight=False)


def main() -> None:
    """Run all benchmarks; stop at the first one that fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.suite", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write the result files to")
    options = parser.parse_args()
    began = time.monotonic()
    models = [source_model(), quantized("fast", "--preset", "fast")]
    models += [quantized("speed", "--recipe", ROOT / "benchmarks" / "speed" / "random_weights.yaml")]
    benchmarks: dict[str, list[str | Path]] = {
        "kernels": ["--operations", "int4_linear", "--seconds", "1"],
        "linear": ["--seconds", "0.2"],
        "attention": ["--seconds", "0.5"],
        "memory": [*models, *map(_baseline, baselines.ON_CPUS)],
        "quantize": ["--sizes", "256", "512"],
        "serving": [*models, "--rounds", "2"],
    }
    for name, arguments in benchmarks.items():
        run(name, *arguments, "--json", options.results / f"{name}.json")
    print("\n\n".join(["", *tables(options.results)]))
    console.print(f"\n{(time.monotonic() - began) / 60:.0f} minutes, making the models included")


def run(name: str, *arguments: str | Path) -> None:
    """Run one benchmark in its own process; it prints its table to this terminal."""
    console.print(f"\n[bold]benchmarks.speed.{name}[/bold]")
    subprocess.run([sys.executable, "-m", f"benchmarks.speed.{name}", *map(str, arguments)], check=True, cwd=ROOT)


def _baseline(name: str) -> Path:
    """Convert the source model to one of vLLM's other formats."""
    folder = DEMO / f"smollm2-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    baselines.convert(name, source_model(), folder)
    return folder


if __name__ == "__main__":
    main()
