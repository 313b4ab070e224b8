"""`make bench`: a short version of every benchmark of speed and size, one after the other, and the page.

The model is SmolLM2-135M-Instruct: as it is, at W4A4KV4 (`fast`), and the same with an 8-bit vocabulary matrix
(`random_weights.yaml`, rounded to nearest: its answers are bad, its speed is not); memory also in vLLM's other integer
formats, which `benchmarks.speed.serving` serves as well, where there is time to compile them. Accuracy needs texts and
tasks that are not in the repository; its file is drawn as it is.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.common.models import DEMO, ROOT, quantized, source_model
from benchmarks.page import RESULTS
from benchmarks.speed import baselines as peers

console = Console(highlight=False)


def main() -> None:
    """Run everything; stops at the first benchmark that fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.suite", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result files and the page")
    options = parser.parse_args()
    began = time.monotonic()
    models = [source_model(), quantized("fast", "--preset", "fast")]
    models += [quantized("speed", "--recipe", ROOT / "benchmarks" / "speed" / "random_weights.yaml")]
    others = [_peer(name) for name in peers.ON_CPUS]
    benchmarks: dict[str, list[str | Path]] = {
        "kernels": ["--operations", "int4_linear", "--seconds", "1"],
        "linear": ["--seconds", "0.2"],
        "attention": ["--seconds", "0.5"],
        "memory": [*models, *others],
        "quantize": ["--sizes", "256", "512"],
        "serving": [*models, "--rounds", "2"],
    }
    for name, arguments in benchmarks.items():
        run(name, *arguments, "--json", options.results / f"{name}.json")
    run("page", "--results", options.results)
    console.print(f"{(time.monotonic() - began) / 60:.0f} minutes, models made included")


def run(name: str, *arguments: str | Path) -> None:
    """One benchmark, in a process of its own; its table goes to this terminal."""
    console.print(f"\n[bold]benchmarks.{name}[/bold]")
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)], check=True, cwd=ROOT)


def _peer(name: str) -> Path:
    """The source model in one of vLLM's other formats."""
    folder = DEMO / f"smollm2-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    peers.convert(name, source_model(), folder)
    return folder


if __name__ == "__main__":
    main()
