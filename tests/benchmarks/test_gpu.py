"""What of a GPU run can be rehearsed without one: checks, interpreted; commands, limits, rows; a whole dry run."""

import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.common.models import ROOT
from benchmarks.common.server import ServerError
from benchmarks.gpu import cache_attention, engines, run, served, smoke, tune, vllm_layers
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.steps import STAGES, Plan, Step
from benchmarks.speed.serving import Case
from tests.common.checkpoints import write_random
from tests.common.interpreted import (
    attention,
    decode,
    interpreter_only,
    kv_store,
    linear,
    tiles,
    weights,
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("test", tmp_path / "rows.jsonl", 600, dry_run=True)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def dry_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a dry run of all stages."""
    output = tmp_path_factory.mktemp("dry") / "output"
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [ROOT / "benchmarks" / "gpu" / "run.sh", output, "--dry-run", "--budget", "800"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return rows(output / "rows.jsonl")


@interpreter_only
def test_a_dry_run_goes_through_every_stage(dry_rows: list[dict[str, Any]]) -> None:
    outcomes = {row["step"]: row["outcome"] for row in dry_rows if row["stage"] == "run"}
    assert [row["of"] for row in dry_rows if row["stage"] == "run"] == sorted(
        (row["of"] for row in dry_rows if row["stage"] == "run"), key=STAGES.index
    )
    run_here = ("smoke", "tests", "linears", "attention", "layer", "vllm_layers", "experts", "served")
    assert {outcomes[step] for step in run_here} == {"done"}
    assert {outcomes[step] for step in outcomes.keys() - set(run_here)} == {"skipped"}
    assert not [row for row in dry_rows if "problem" in row and row.get("format") != "FP8"]  # which is not for CPUs


@interpreter_only
def test_every_row_says_where_it_is_from(dry_rows: list[dict[str, Any]]) -> None:
    for row in dry_rows:
        assert row["commit"]
        assert row["device"]
        assert "driver" in row
        assert {"torch", "triton", "vllm", "cuda"} <= set(row["versions"])


@interpreter_only
def test_the_dry_run_counts_its_tests(dry_rows: list[dict[str, Any]]) -> None:
    (row,) = [row for row in dry_rows if row.get("step") == "tests"]
    assert row["tests"]["PASSED"] > 0
    assert row["wrong"] == []


@interpreter_only
def test_the_dry_run_launches_both_kernels_of_attention(dry_rows: list[dict[str, Any]]) -> None:
    checked = [(row["kernel"], row["queries"]) for row in dry_rows if row["stage"] == "smoke" and "queries" in row]
    assert checked == [("kv_store", 1), ("kv_decode", 1), ("kv_decode", 4), ("kv_attention", 12)]
    assert [row["queries"] for row in dry_rows if row["stage"] == "attention"] == [1, 4, 40]


@interpreter_only
def test_wrong_kernels_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert smoke.kv_store is kv_store
    assert (cache_attention.decode, cache_attention.prompt) == (decode, attention)
    right = linear.gemm
    monkeypatch.setattr(smoke.triton_linear, "gemm", lambda *a, **k: 1.05 * right(*a, **k))
    assert not smoke.check_linear(smoke.PRODUCTS[0], "cpu")["right"]
    (mixture,) = smoke.MIXTURES
    assert smoke.check_experts(mixture, "cpu")["right"]
    sums = smoke.triton_experts.experts
    monkeypatch.setattr(smoke.triton_experts, "experts", lambda *arguments: 1.05 * sums(*arguments))
    assert not smoke.check_experts(mixture, "cpu")["right"]
    monkeypatch.setattr(kv_store, "kv_store", lambda *arguments: None)
    assert not smoke.check_store(smoke.CASES[0], "cpu")["right"]
    one, few, prompt = smoke.CASES
    assert smoke.check_attention(few, "cpu")["right"]
    monkeypatch.setattr(decode, "kv_decode", lambda *arguments: arguments[-3].fill_(1))
    assert [smoke.check_attention(case, "cpu")["right"] for case in (one, few, prompt)] == [False, False, True]
    monkeypatch.setattr(attention, "kv_attention", lambda *arguments: arguments[-1].fill_(1))
    assert not smoke.check_attention(prompt, "cpu")["right"]


@interpreter_only
def test_the_smoke_stage_cuts_contexts_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "kv_splits_reduce_kernel", None)
    smoke.check_attention(smoke.CASES[0], "cpu")
    with pytest.raises(TypeError):  # it would be launched
        smoke.check_attention(smoke.CASES[1], "cpu")


@interpreter_only
def test_a_wrong_kernel_fails_the_smoke_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smoke, "check_store", lambda case, device: {"error": 1.0, "right": False})
    monkeypatch.setattr("sys.argv", ["smoke", "--rows", str(tmp_path / "rows.jsonl"), "--dry-run"])
    with pytest.raises(SystemExit, match="1"):
        smoke.main()
    assert [row["right"] for row in rows(tmp_path / "rows.jsonl")[1:]] == [False, True, True, True, True, True, True]


def test_a_failure_costs_one_row(bench: Bench) -> None:
    bench.attempt(lambda: {"us": 1 / 0}, kernel="first")
    bench.attempt(lambda: {"us": 2.0}, kernel="second")
    bench.seconds = 0
    bench.attempt(lambda: {"us": 3.0}, kernel="third")
    first, second, third = rows(bench.rows)
    assert first["problem"] == "ZeroDivisionError: division by zero"
    assert second["us"] == 2
    assert third["skipped"] == "no time left"


def step(*command: str, seconds: float = 20) -> Step:
    return Step("smoke", "step", command, seconds)


def test_a_step_that_fails_leaves_its_log_and_the_next_runs(bench: Bench, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "print('an illegal address'); raise SystemExit(3)"
    assert run.run(bench, step(sys.executable, "-c", code), log) == "failed"
    assert run.run(bench, step(sys.executable, "-c", "pass"), log) == "done"
    failed, done = rows(bench.rows)
    assert (failed["exit_code"], done["exit_code"]) == (3, 0)
    assert "an illegal address" in failed["end_of_log"]


def test_a_step_ends_at_its_limit_with_all_that_it_started(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LEAST_SECONDS", 2)
    code = "import subprocess; subprocess.run(['sleep', '987'], start_new_session=True)"
    began = time.monotonic()
    assert (
        run.run(bench, step(sys.executable, "-c", code, seconds=run.LEAST_SECONDS), tmp_path / "log") == "out of time"
    )
    assert time.monotonic() - began < run.LEAST_SECONDS + 10
    started = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "987"]]
    _, left = psutil.wait_procs(started, timeout=5)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left)  # killed; its parent is gone, too


def test_what_the_budget_does_not_reach_is_skipped(bench: Bench, tmp_path: Path) -> None:
    bench.seconds = run.LEAST_SECONDS / 2
    assert run.run(bench, step(sys.executable, "-c", "pass"), tmp_path / "log") == "skipped"
    assert rows(bench.rows)[0]["reason"] == "no time left"


def test_a_step_gets_its_time_limit_as_an_argument(bench: Bench, tmp_path: Path) -> None:
    plan = Plan(tmp_path, None, dry_run=True)
    (first,) = plan.steps(("smoke",))
    printing = step(sys.executable, "-c", "import sys; print(sys.argv)", *first.command[3:])
    run.run(bench, printing, tmp_path / "log")
    assert "'--seconds', '15'" in (tmp_path / "log").read_text()


def test_tests_are_counted_with_workers_and_without() -> None:
    log = """\
tests/test_a.py::test_one[hadamard 64] PASSED       [ 25%]
tests/test_a.py::test_two FAILED                    [ 50%]
[gw3] [ 75%] PASSED tests/test_b.py::test_three[blocks 32]
[gw11] [100%] FAILED tests/test_b.py::test_four
FAILED tests/test_b.py::test_four - AssertionError
"""
    found = run.summary(Step("tests", "tests", (), 1), log)
    assert found["tests"] == {"PASSED": 2, "FAILED": 2}
    assert found["wrong"] == ["tests/test_a.py::test_two", "tests/test_b.py::test_four"]


def test_a_sanitizer_has_the_last_word() -> None:
    log = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 2 errors\n"
    assert run.summary(Step("sanitize", "memcheck", (), 1), log) == {"summary": "ERROR SUMMARY: 2 errors"}


def test_an_unknown_stage_is_refused_by_name() -> None:
    assert run.stages("smoke,served") == ("smoke", "served")
    with pytest.raises(Exception, match="no stage serve"):
        run.stages("smoke,serve")


@interpreter_only
def test_every_format_is_a_layer_of_vllms_or_says_why_not(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with vllm_layers.one_worker("cpu"):
        for name in vllm_layers.formats(vllm_layers.SMALL):
            vllm_layers.measure(bench, name, "down", vllm_layers.SMALL)
        monkeypatch.setattr(vllm_layers, "make", lambda *_: 1 / 0)
        vllm_layers.measure(bench, "W4A16", "down", vllm_layers.SMALL)
    ours, timed, fp8, *_, failed = rows(bench.rows)
    assert ours["kernel"] == "InfoQuantLinearMethod"
    assert timed["tokens"] == vllm_layers.SMALL_TOKENS[0]
    assert "problem" in fp8  # which is not for CPUs
    assert failed["problem"] == "ZeroDivisionError: division by zero"


def test_servers_start_with_what_the_one_before_needed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[tuple[str, ...], dict[str, str]]] = []

    class Running:
        def kv_tokens(self) -> int:
            return 1000

    @contextmanager
    def serve(model: Path, log: Path, *arguments: str, environment: dict[str, str], seconds: float) -> Any:
        started.append((arguments, dict(environment)))
        if "VLLM_USE_V2_MODEL_RUNNER" not in environment:
            raise ServerError("it does not start so")
        yield Running()

    monkeypatch.setattr(engines, "serve", serve)
    found = engines.Engines(bench, bench.rows.parent / "logs")
    for name in ("first", "second"):
        with found.served(name, Path("model"), "--max-model-len", "64") as server:
            assert server.kv_tokens() == 1000
    assert [len(environment) for _, environment in started] == [0, 1, 2, 2]
    assert "--kernel-config" in started[-1][0]
    assert "--enforce-eager" not in started[-1][0]
    assert ["problem" in row for row in rows(bench.rows)] == [True, True, False, False]


def test_a_case_is_measured_by_vllms_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = []

    def client(options: Any) -> dict[str, Any]:
        given.append(options)
        return {"failed": 0, **dict.fromkeys(served.FIGURES, 5.0)}

    monkeypatch.setattr("vllm.benchmarks.serve.main", client)

    class Running:
        url, model = "http://127.0.0.1:1", tmp_path

    found = served.figures(Running(), Case(1024, 128, 64))  # type: ignore[arg-type]
    assert (found["requests"], found["tokens_per_s"]) == (64, 5)
    (options,) = given
    assert (options.num_prompts, options.max_concurrency, options.random_input_len) == (64, 64, 1024)


def test_the_w4a16_model_is_the_plain_one_with_its_format(tmp_path: Path) -> None:
    plain = tmp_path / f"{served.SHAPE}-none"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"hidden_size": 4096}))
    config = json.loads((served.model(tmp_path, "w4a16") / "config.json").read_text())
    assert config["hidden_size"] == 4096
    assert config["quantization_config"]["format"] == "pack-quantized"


@interpreter_only
def test_the_fastest_right_tile_is_what_the_table_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "TOKENS", (2,))
    monkeypatch.setattr(tune, "FEW", tune.FEW[:4])
    times = itertools.count(1000, -1)
    monkeypatch.setattr(tune, "time_of", lambda *_: next(times))
    monkeypatch.setattr(tune.torch, "device", lambda _: torch.empty(0).device)
    checkpoint, file = write_random(tmp_path / "checkpoint"), tmp_path / "tiles.json"
    monkeypatch.setattr("sys.argv", ["tune", str(checkpoint), "--output", str(file)])
    tune.main()
    (entry, *_) = tiles.measured(str(file))
    monkeypatch.setenv(tiles.TILES, str(file))
    shape = weights.layout(entry.features, 1, 64 if entry.grouped else None)
    assert tiles.linear_tile(entry.arch, 1, entry.channels, shape) == entry.tile
    assert entry.tile == list(tune.candidates(2, shape))[-1]  # the fastest, as it was the last


def test_a_tile_with_other_results_ends_the_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = tune.Linear(128, 32, None, True, 4)
    monkeypatch.setattr(tune, "time_of", lambda *_: 1.0)
    wrong = [lambda tile: torch.full((1,), float(tile.block_n + tile.stages))]
    monkeypatch.setattr(tune.Linear, "products", lambda *_: wrong)
    with pytest.raises(ValueError, match="are not those of"):
        tune.best(linear, 1, torch.device("cpu"))
