"""A LLaMA-3-8B shape served by vLLM on this GPU with made-up weights: W4A4KV4 beside bf16, FP8 and W4A16.

One server for each format, each with the best cache that its users have, measured by `vllm bench serve`. A row is a
format and a case; the row of a server holds the tokens of its cache.
"""

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.models import ROOT
from benchmarks.common.server import Server
from benchmarks.gpu.bench import Bench, parser
from benchmarks.gpu.engines import Engines
from benchmarks.speed.baselines import FORMATS
from benchmarks.speed.serving import FIGURES, Case, client_arguments

SHAPE = "llama-3-8b"
CASES = (
    *(Case(1024, 128, concurrent) for concurrent in (1, 64)),
    Case(2048, 1, 1),
    Case(8192, 1, 1),
    Case(8192, 128, 64),
    *(Case(1024, 128, concurrent) for concurrent in (16, 256)),
)
"""The most telling first: the time may end before the last."""
PROMPTS = 3
"""Of cases of one request, of which the median counts."""
LONGEST = max(case.input_tokens + case.output_tokens for case in CASES) + 64
MOST = max(case.concurrent for case in CASES)
CAPTURED = (1, 2, 4, 8, 16, 32, 64, 128, MOST)
SERVER = (
    *("--load-format", "dummy", "--max-model-len", str(LONGEST), "--max-num-seqs", str(MOST)),
    *("--max-num-batched-tokens", "8192", "--no-enable-prefix-caching"),
    *("--compilation-config", json.dumps({"cudagraph_capture_sizes": CAPTURED})),
)
FP8_CACHE = ("--kv-cache-dtype", "fp8")
SERVED: dict[str, tuple[str, tuple[str, ...]]] = {
    "W4A4KV4": ("fast", ()),
    "bf16": ("none", ()),
    "FP8": ("none", ("--quantization", "fp8", *FP8_CACHE)),
    "W4A16": ("w4a16", ("--linear-backend", "marlin", *FP8_CACHE)),
}
"""Folder (a preset of `benchmarks.shapes`, or w4a16) and arguments by format, the most important first."""


def main() -> None:
    """Serve and measure each format."""
    arguments = parser("served", __doc__)
    arguments.add_argument("--models", type=Path, required=True, help="folder for the models, which have no weights")
    arguments.add_argument("--formats", nargs="+", choices=SERVED, default=list(SERVED))
    options = arguments.parse_args()
    bench = Bench.of("served", options)
    if bench.dry_run:
        check_arguments(bench, options.models)
        return
    engines = Engines(bench, options.rows.parent / "logs")
    for name in options.formats:
        bench.attempt(partial(serve_format, bench, engines, name, options.models), format=name)


def serve_format(bench: Bench, engines: Engines, name: str, models: Path) -> dict[str, Any]:
    """Serve one format and write a row for each case; return how many there were."""
    preset, arguments = SERVED[name]
    with engines.served(name, model(models, preset), *SERVER, *arguments) as server:
        for case in CASES:
            bench.attempt(partial(figures, server, case), format=name, **vars(case))
    return {"cases": len(CASES)}


def model(models: Path, preset: str) -> Path:
    """Return the folder of a model without weights; made at the first call."""
    folder = models / f"{SHAPE}-{preset}"
    if folder.exists():
        return folder
    if preset in FORMATS:
        shutil.copytree(model(models, "none"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FORMATS[preset][1]}))
        return folder
    command = [sys.executable, "-m", "benchmarks.shapes", SHAPE, str(folder), "--preset", preset]
    subprocess.run(command, check=True, cwd=ROOT)
    return folder


def figures(server: Server, case: Case) -> dict[str, float]:
    """Return what `vllm bench serve` finds; run in this process, which has imported vLLM once for all cases."""
    from vllm.benchmarks.serve import main as bench_serve

    requests = case.concurrent if case.concurrent > 1 else PROMPTS
    with contextlib.redirect_stdout(io.StringIO()):
        found = bench_serve(client_options(server.url, server.model, case, requests))
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} of {requests} requests failed: {found['errors']}"[:1000])
    return {"requests": requests, **{ours: float(found[theirs]) for theirs, ours in FIGURES.items()}}


def client_options(url: str, served: Path, case: Case, requests: int) -> argparse.Namespace:
    """Return parsed arguments of `vllm bench serve`."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    made = FlexibleArgumentParser()
    add_cli_args(made)
    arguments = ["--model", served, *client_arguments(url, case, requests, warmups=1, seed=0)]
    return made.parse_args([str(argument) for argument in arguments])


def check_arguments(bench: Bench, models: Path) -> None:
    """Write a row for each command line that vLLM's own parsers take; nothing is served."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    served = make_arg_parser(FlexibleArgumentParser())
    for name, (preset, more) in SERVED.items():
        folder = models / f"{SHAPE}-{preset}"
        line = ["--model", str(folder), *SERVER, *more]
        bench.attempt(partial(_parsed, served.parse_args, line), format=name)
    for case in CASES:
        bench.attempt(partial(_parsed, client_options, "http://127.0.0.1", models, case, 1), **vars(case))


def _parsed(parse: Callable[..., argparse.Namespace], *arguments: Any) -> dict[str, Any]:
    parse(*arguments)
    return {"accepted": [str(argument) for argument in arguments]}


if __name__ == "__main__":
    main()
