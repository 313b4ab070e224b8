"""Decoding throughput of a served checkpoint against the served bf16 model, with `vllm bench serve`.

Both servers are up throughout and take turns (A, B, A, B, ...), so that a slow minute of the machine
hits both. Prompts are random tokens; a row is one model at one number of concurrent requests.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance, write_rows
from benchmarks.server import Server, serve, stop_on_sigterm

CONCURRENT = (1, 8)


def main() -> None:
    """Measure, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("reference", type=Path, help="folder of the unquantised model")
    parser.add_argument("checkpoint", type=Path, help="folder of the InfoQuant checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="how often each server takes its turn")
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--compiled", action="store_true", help="serve without --enforce-eager")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    stop_on_sigterm()
    arguments = ["--max-model-len", "1024", *([] if options.compiled else ["--enforce-eager"])]
    with (
        tempfile.TemporaryDirectory() as scratch,
        serve(options.reference, Path(scratch) / "a.log", *arguments) as reference,
        serve(options.checkpoint, Path(scratch) / "b.log", *arguments) as checkpoint,
    ):
        rows = [row for number in CONCURRENT for row in compare([reference, checkpoint], number, options)]
    Console().print(table(rows))
    if options.json:
        write_rows(rows, options.json)


def compare(servers: list[Server], concurrent: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per server: tokens per second of every round, their median and range."""
    rates: dict[int, list[float]] = {server.port: [] for server in servers}
    for _ in range(options.rounds):
        for server in servers:
            rates[server.port].append(output_rate(server, concurrent, options))
    return [
        {
            "model": server.model.name,
            "concurrent": concurrent,
            "output_tokens_per_s": statistics.median(rates[server.port]),
            "lowest": min(rates[server.port]),
            "highest": max(rates[server.port]),
            "rounds": rates[server.port],
            "input_tokens": options.input_tokens,
            "output_tokens": options.output_tokens,
            "mode": "compiled" if options.compiled else "eager",
            **provenance(options.seed),
        }
        for server in servers
    ]


def output_rate(server: Server, concurrent: int, options: argparse.Namespace) -> float:
    """Generated tokens per second of one run of `vllm bench serve`: two waves of `concurrent` requests."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--base-url", server.url]
        command += ["--model", str(server.model), "--dataset-name", "random", "--ignore-eos", "--temperature", "0"]
        command += ["--random-input-len", str(options.input_tokens), "--random-output-len", str(options.output_tokens)]
        command += ["--num-prompts", str(2 * concurrent), "--max-concurrency", str(concurrent)]
        command += ["--num-warmups", str(concurrent), "--seed", str(options.seed), "--disable-tqdm"]
        command += ["--save-result", "--result-dir", scratch, "--result-filename", "result.json"]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        if done.returncode:
            sys.exit(f"vllm bench serve exited with code {done.returncode}:\n{done.stderr[-4000:]}")
        result = json.loads((Path(scratch) / "result.json").read_text())
    if result["failed"]:
        sys.exit(f"{result['failed']} of {2 * concurrent} requests to {server.model} failed")
    return float(result["output_throughput"])


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    shape = f"{rows[0]['input_tokens']} tokens in, {rows[0]['output_tokens']} out, {rows[0]['mode']}"
    printed = Table(title=f"Generated tokens per second ({shape}; median of {len(rows[0]['rounds'])}, range)")
    for heading in ("served model", "requests at a time", "tokens/s", "range"):
        printed.add_column(heading)
    for row in rows:
        spread = f"{row['lowest']:.1f} to {row['highest']:.1f}"
        printed.add_row(row["model"], str(row["concurrent"]), f"{row['output_tokens_per_s']:.1f}", spread)
    return printed


if __name__ == "__main__":
    main()
