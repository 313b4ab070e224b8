"""Correctness, then timings, on a machine with one NVIDIA GPU of compute capability 8.0 or more.

Stages run in order of importance, each step in a process of its own with a time limit, under a budget for all; what
fails costs itself alone. OUTPUT/rows.jsonl has a row for every figure and every step, written as they come;
OUTPUT/logs what each step said. Paths are relative to the repository.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.models import ROOT
from benchmarks.gpu.bench import MARGIN_SECONDS, Bench
from benchmarks.gpu.steps import SECONDS, STAGES, Plan, Step

BUDGET_SECONDS = 480
LEAST_SECONDS = 10
"""What is left of the budget is not worth starting a step for less."""
LOG_TAIL = 1500
WORKERS_TEST = re.compile(r"^\[gw\d+\] \[ *\d+%\] (?P<outcome>[A-Z]+) (?P<test>tests/.*?) *$", re.M)
OWN_TEST = re.compile(r"^(?P<test>tests/\S+?::.*?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.M)
"""A line of `pytest -v`, of a worker and of pytest's own process."""
SUMMARY = re.compile(r"ERROR SUMMARY: \d+ errors?|RACECHECK SUMMARY: .*")


def main() -> None:
    """Run the stages; exits with 1 where a step failed, once all have run."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/run.sh", description=__doc__)
    parser.add_argument("output", type=Path, help="folder for rows and logs")
    parser.add_argument(
        "--stage", type=stages, default=STAGES, metavar="A,B", help=f"these alone of {', '.join(STAGES)}"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help=f"seconds for all ({BUDGET_SECONDS})")
    parser.add_argument("--checkpoint", type=Path, help="W4A4KV4 checkpoint of a real model, for the stage `answer`")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreted on a CPU: rehearse the run")
    options = parser.parse_args()
    plan = Plan(options.output.resolve(), options.checkpoint and options.checkpoint.resolve(), options.dry_run)
    (plan.output / "logs").mkdir(parents=True, exist_ok=True)
    bench = Bench("run", plan.rows, options.budget, options.dry_run)
    os.chdir(ROOT)
    outcomes = [run(bench, step, plan.output / "logs" / f"{step.name}.log") for step in plan.steps(options.stage)]
    sys.exit(1 if "failed" in outcomes or "out of time" in outcomes else 0)


def stages(text: str) -> tuple[str, ...]:
    """Split A,B; raises ValueError, which argparse explains, where a stage is unknown."""
    found = tuple(text.split(","))
    if unknown := set(found) - set(STAGES):
        raise argparse.ArgumentTypeError(f"no stage {', '.join(sorted(unknown))}: there are {', '.join(STAGES)}")
    return found


def run(bench: Bench, step: Step, log: Path) -> str:
    """Run one step and write its row; return its outcome."""
    limit = min(step.seconds, bench.left())
    command = [word.replace(SECONDS, f"{limit - MARGIN_SECONDS:.0f}") for word in step.command]
    facts: dict[str, Any] = {"of": step.stage, "step": step.name, "command": " ".join(command)}
    facts["environment"] = step.environment
    if step.missing or limit < LEAST_SECONDS:
        bench.row(**facts, outcome="skipped", reason=step.missing or "no time left")
        return "skipped"
    began = time.monotonic()
    code = execute(command, step.environment, log, limit)
    outcome = "done" if code == 0 else "out of time" if code is None else "failed"
    found = log.read_text(errors="replace")
    facts |= {"outcome": outcome, "exit_code": code, "seconds": time.monotonic() - began, **summary(step, found)}
    bench.row(**facts, **({} if outcome == "done" else {"end_of_log": found[-LOG_TAIL:]}))
    return outcome


def execute(command: list[str], environment: dict[str, str], log: Path, limit: float) -> int | None:
    """Run a command; return its exit code, None where the time ended. All that it started ends with it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
        )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):  # a server has a group of its own
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def summary(step: Step, log: str) -> dict[str, Any]:
    """Return what a step's log comes to: tests by outcome and those that failed, or a sanitizer's last word."""
    if step.stage == "tests":
        outcomes = {line["test"]: line["outcome"] for form in (WORKERS_TEST, OWN_TEST) for line in form.finditer(log)}
        wrong = sorted(test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
        return {"tests": dict(Counter(outcomes.values())), "wrong": wrong}
    said = SUMMARY.findall(log) if step.stage == "sanitize" else []
    return {"summary": said[-1]} if said else {}


if __name__ == "__main__":
    main()
