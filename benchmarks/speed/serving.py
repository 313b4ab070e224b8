"""Compare served models by `vllm bench serve`, `vllm bench throughput` and `vllm bench latency`.

All servers run throughout. Each round measures all of them, in another order, so that a slow minute of the machine
affects all. A case is IN:OUT:CONCURRENT: random prompts of IN tokens, answers of OUT tokens, CONCURRENT requests at a
time. Ratios are to the first model in the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.programs import VLLM
from benchmarks.common.provenance import provenance, write_rows
from benchmarks.common.server import Server, serve, stop_on_sigterm, vllm_environment

CASES = ("64:64:1", "64:64:8", "1024:1:1")
CONCURRENCY = ("64:64:1", "64:64:2", "64:64:4", "64:64:8", "64:64:16", "64:64:32")
CONTEXTS = tuple(f"{context}:32:1" for context in (256, 1024, 4096, 16_000))
FIGURES = {  # key in the result file of `vllm bench serve`: name here
    "output_throughput": "tokens_per_s",
    "total_token_throughput": "all_tokens_per_s",
    **{
        f"{rank}_{figure}_ms": f"{rank}_{figure}_ms" for rank in ("median", "p99") for figure in ("ttft", "tpot", "itl")
    },
}
OFFLINE_INPUT, OFFLINE_OUTPUT, OFFLINE_BATCH = 128, 64, 8
ROOM = 64  # tokens; random prompts can get longer than asked for


@dataclass(frozen=True)
class Case:
    """Random prompts of `input_tokens`, answered with `output_tokens`, `concurrent` at a time."""

    input_tokens: int
    output_tokens: int
    concurrent: int

    @property
    def figure(self) -> str:
        """The figure that is compared: time to first token if that is the only one, else tokens per second."""
        return "median_ttft_ms" if self.output_tokens == 1 else "tokens_per_s"

    def gain(self, ours: dict[str, float], first: dict[str, float]) -> float:
        """Return the speed relative to `first`."""
        ratio = ours[self.figure] / first[self.figure]
        return 1 / ratio if self.output_tokens == 1 else ratio


def main() -> None:
    """Measure, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.serving", description=__doc__)
    parser.add_argument(
        "models", type=Path, nargs="+", help="folders of models; the others are compared with the first"
    )
    parser.add_argument("--cases", nargs="+", type=case, default=[case(text) for text in CASES], metavar="IN:OUT:N")
    parser.add_argument("--concurrency", action="store_true", help="measure 1 to 32 requests at a time")
    parser.add_argument("--contexts", action="store_true", help="measure contexts of 256 to 16k tokens")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each server and case")
    parser.add_argument(
        "--requests", type=int, default=4, help="requests per measurement; at least two per concurrent request"
    )
    parser.add_argument("--offline", action="store_true", help="also run `vllm bench throughput` and `latency`")
    parser.add_argument("--eager", action="store_true", help="serve with --enforce-eager")
    parser.add_argument("--kv-gib", type=int, default=1, help="memory for each server's KV cache")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    stop_on_sigterm()
    cases = [case(text) for text in CONCURRENCY * options.concurrency + CONTEXTS * options.contexts]
    rows = served_rows(options.models, cases or options.cases, options)
    if options.offline:
        rows += offline_rows(options.models, options)
    Console().print(table(rows))
    if options.json:
        write_rows(rows, options.json)


def case(text: str) -> Case:
    """Parse IN:OUT:CONCURRENT; raises ValueError, which argparse reports."""
    return Case(*(int(part) for part in text.split(":")))


def served_rows(models: list[Path], cases: list[Case], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start a server for each model and measure all cases."""
    longest = max(each.input_tokens + each.output_tokens for each in cases) + ROOM
    arguments = ["--max-model-len", str(longest), "--no-enable-prefix-caching"]
    arguments += ["--enforce-eager"] if options.eager else []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        servers = [
            stack.enter_context(serve(model, Path(scratch) / f"{index}.log", *arguments, kv_gib=options.kv_gib))
            for index, model in enumerate(models)
        ]
        return [row for each in cases for row in measure(servers, each, options)]


def measure(servers: list[Server], chosen: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per server: medians over the rounds, and the speed relative to the first server with its range."""
    requests = max(2 * chosen.concurrent, options.requests)
    rounds: list[list[dict[str, float]]] = []
    for number in range(options.rounds):
        found: dict[int, dict[str, float]] = {}
        for index in turn_order(len(servers), number):
            found[index] = bench_serve(servers[index], chosen, requests, options.seed + number)
        rounds.append([found[index] for index in range(len(servers))])
    rows = []
    for index, server in enumerate(servers):
        gains = [chosen.gain(figures[index], figures[0]) for figures in rounds]
        rows.append(
            {
                "model": server.model.name,
                "command": "vllm bench serve",
                "mode": "eager" if options.eager else "compiled",
                "input_tokens": chosen.input_tokens,
                "output_tokens": chosen.output_tokens,
                "concurrent": chosen.concurrent,
                **{name: statistics.median(figures[index][name] for figures in rounds) for name in FIGURES.values()},
                **spread(gains),
                "rounds": [figures[index][chosen.figure] for figures in rounds],
                **provenance(options.seed),
            }
        )
    return rows


def turn_order(count: int, number: int) -> list[int]:
    """Return the order of `count` servers in a round: each round begins with another one."""
    return [(index + number) % count for index in range(count)]


def spread(gains: list[float]) -> dict[str, float]:
    """Return median and range of the relative speed."""
    return {"times_as_fast": statistics.median(gains), "lowest": min(gains), "highest": max(gains)}


def bench_serve(server: Server, chosen: Case, requests: int, seed: int) -> dict[str, float]:
    """Return the figures of one run of `vllm bench serve`."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "result.json"
        arguments = client_arguments(server.url, chosen, requests, chosen.concurrent, seed)
        arguments += ["--save-result", "--save-detailed", "--result-dir", scratch, "--result-filename", file.name]
        vllm_bench("serve", server.model, arguments)
        result = json.loads(file.read_text())
    if result["failed"]:
        reason = next(filter(None, result["errors"]), "no reason given")
        sys.exit(f"{result['failed']} of {requests} requests to {server.model} failed: {reason}")
    return {ours: float(result[theirs]) for theirs, ours in FIGURES.items()}


def client_arguments(url: str, chosen: Case, requests: int, warmups: int, seed: int) -> list[Any]:
    """Return arguments of `vllm bench serve` for a case, without the model's and the result file's."""
    arguments: list[Any] = ["--base-url", url, "--dataset-name", "random", "--ignore-eos", "--temperature", 0]
    arguments += ["--random-input-len", chosen.input_tokens, "--random-output-len", chosen.output_tokens]
    arguments += ["--num-prompts", requests, "--max-concurrency", chosen.concurrent]
    arguments += ["--num-warmups", warmups, "--seed", seed, "--disable-tqdm"]
    return [*arguments, "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99"]


def offline_rows(models: list[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return rows of `vllm bench throughput` and `vllm bench latency`, which run an engine without a server."""
    rows = []
    for command, key, better in (("throughput", "tokens_per_second", 1), ("latency", "avg_latency", -1)):
        rounds = []
        for number in range(options.rounds):
            found = {
                index: bench_offline(command, key, models[index], options) for index in turn_order(len(models), number)
            }
            rounds.append([found[index] for index in range(len(models))])
        for index, model in enumerate(models):
            rows.append(
                {
                    "model": model.name,
                    "command": f"vllm bench {command}",
                    "mode": "eager" if options.eager else "compiled",
                    "input_tokens": OFFLINE_INPUT,
                    "output_tokens": OFFLINE_OUTPUT,
                    "concurrent": OFFLINE_BATCH,
                    key: statistics.median(values[index] for values in rounds),
                    **spread([(values[index] / values[0]) ** better for values in rounds]),
                    "rounds": [values[index] for values in rounds],
                    **provenance(options.seed),
                }
            )
    return rows


def bench_offline(command: str, key: str, model: Path, options: argparse.Namespace) -> float:
    """Return one figure of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "result.json"
        arguments = ["--seed", options.seed, "--max-model-len", 1024, "--output-json", file]
        if command == "throughput":
            arguments += ["--random-input-len", OFFLINE_INPUT, "--random-output-len", OFFLINE_OUTPUT]
            arguments += ["--dataset-name", "random", "--num-prompts", 4 * OFFLINE_BATCH]
        else:
            arguments += ["--input-len", OFFLINE_INPUT, "--output-len", OFFLINE_OUTPUT]
            arguments += ["--batch-size", OFFLINE_BATCH, "--num-iters-warmup", 1, "--num-iters", 3]
        vllm_bench(command, model, [*arguments, *(["--enforce-eager"] if options.eager else [])], options.kv_gib)
        return float(json.loads(file.read_text())[key])


def vllm_bench(command: str, model: Path, arguments: list[Any], kv_gib: int = 1) -> None:
    """Run `vllm bench COMMAND`; if it fails, exit with the end of its error output."""
    full = [*VLLM, "bench", command, "--model", str(model), *map(str, arguments)]
    done = subprocess.run(full, check=False, capture_output=True, text=True, env=vllm_environment(kv_gib))
    if done.returncode:
        sys.exit(f"vllm bench {command} of {model} exited with code {done.returncode}:\n{done.stderr[-4000:]}")


def table(rows: list[dict[str, Any]]) -> Table:
    """Format the rows for a terminal."""
    printed = Table(title=f"vLLM, {rows[0]['mode']}, median of {len(rows[0]['rounds'])} rounds")
    for heading in (
        "command",
        "in, out, at a time",
        "model",
        "tokens/s",
        "first token, ms",
        "next, ms",
        "times as fast",
    ):
        printed.add_column(heading)
    for row in rows:
        shape = f"{row['input_tokens']}, {row['output_tokens']}, {row['concurrent']}"
        rate = row.get("tokens_per_s", row.get("tokens_per_second"))
        numbers = [rate, row.get("median_ttft_ms"), row.get("median_tpot_ms")]
        shown = ["" if number is None else f"{number:.1f}" for number in numbers]
        gain = f"{row['times_as_fast']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
        printed.add_row(row["command"].removeprefix("vllm bench "), shape, row["model"], *shown, gain)
    return printed


if __name__ == "__main__":
    main()
