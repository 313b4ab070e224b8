"""The `infoquant` executable: results, exit codes, and one clear message for what it refuses."""

import json
import shutil
import signal
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from benchmarks.common.programs import INFOQUANT
from offline.cli.common import refusals
from offline.cli.main import app
from offline.signals import Terminated
from tests.common.tiny import write_adapter, write_source

RECIPE = """\
name: small
transform: hadamard
rounding: gptq
calibration: {sequences: 4, sequence_length: 32}
"""


def infoquant(*arguments: object) -> Result:
    """Run the command in this process: starting the executable takes seconds."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def executable(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run([*INFOQUANT, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture(scope="module")
def recipe(source: Path) -> Path:
    file = source.with_name("recipe.yaml")
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def checkpoint(source: Path, recipe: Path) -> Path:
    output = source.with_name("checkpoint")
    done = executable("quantize", source, output, "--recipe", recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"] == "small"
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(message: str, *arguments: object) -> None:
    """Check for exit code 1, one error with `message`, nothing on standard output and no traceback."""
    done = infoquant(*arguments)
    assert done.exit_code == 1, done.stderr
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_explains_every_command() -> None:
    done = executable("--help")
    assert done.returncode == 0
    assert all(
        command in done.stdout
        for command in ("quantize", "verify", "inspect", "eval", "sample", "push", "report", "doctor")
    )


def test_wrong_usage_has_exit_code_2(source: Path, tmp_path: Path, recipe: Path) -> None:
    assert infoquant("quantize").exit_code == 2
    both = infoquant("quantize", source, tmp_path / "out", "--preset", "rtn", "--recipe", recipe)
    assert both.exit_code == 2
    assert "not both" in both.stderr


def test_verify_passes_what_quantize_writes(checkpoint: Path, source: Path) -> None:
    done = infoquant("verify", checkpoint, "--against", source, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
    assert "passed" in infoquant("verify", checkpoint).stdout


def test_verify_has_exit_code_1_for_a_truncated_shard(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "truncated"))
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = infoquant("verify", folder, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert not found["passed"]
    assert shard.name in found["checks"][0]["detail"]


def test_inspect_shows_the_schemes(checkpoint: Path) -> None:
    found = json.loads(infoquant("inspect", checkpoint, "--json").stdout)
    assert found["schemes"]["mlp.down_proj"]["weights"]["num_bits"] == 4
    assert "bits per weight" in infoquant("inspect", checkpoint).stdout


def test_lora_turns_an_adapter_and_refuses_one_that_is_turned(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", source)
    done = infoquant("lora", checkpoint, adapter, tmp_path / "turned")
    assert (done.exit_code, done.stdout.split(",")[0]) == (0, f"{tmp_path / 'turned'}: 14 linears")
    again = infoquant("lora", checkpoint, tmp_path / "turned", tmp_path / "again")
    assert again.exit_code == 1
    assert "is turned already; give the adapter as it was trained" in again.stderr


def test_eval_prints_figures(checkpoint: Path, source: Path) -> None:
    done = infoquant("eval", checkpoint, "--reference", source, "--tokens", 64, "--window", 32, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["kl"]["mean"] > 0


def test_log_has_a_line_for_every_step_with_memory_and_time_left(source: Path, recipe: Path, tmp_path: Path) -> None:
    arguments = ("quantize", source, tmp_path / "out", "--recipe", recipe, "--log-json", tmp_path / "log")
    done = infoquant(*arguments)
    assert done.exit_code == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert all(line["memory_bytes"] > 10**8 for line in lines)
    layers = [line for line in lines if line["event"] == "layer"]
    assert [line["layer"] for line in layers] == [0, 1]
    assert all(0 < line["output_error"] < 1 and line["tokens_per_second"] > 0 for line in layers)
    assert all(line["orthogonality_error"] < 1e-10 for line in layers)
    last = [line for line in lines if line["event"] == "progress"][-1]
    assert (last["stage"], last["done"], last["total"], last["seconds_left"]) == ("layers", 2, 2, 0.0)
    assert "tokens/s" in done.stderr
    refused("log cannot be written", *arguments[:-1], tmp_path / "no" / "log", "--overwrite")


def test_check_ends_with_a_table_a_verdict_and_a_line_of_text(source: Path, recipe: Path, tmp_path: Path) -> None:
    done = infoquant("quantize", source, tmp_path / "out", "--recipe", recipe, "--check")
    assert done.exit_code == 0, done.stderr
    table, verdict, text = (done.stdout.index(words) for words in ("layer by layer", "passed", "> The tide"))
    assert table < verdict < text


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = infoquant("quantize", source, tmp_path / "out", "--preset", "rtn", "--dry-run", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["total_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_output_that_exists_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(str(tmp_path / "out"), "quantize", source, tmp_path / "out", "--preset", "rtn")
    refused(str(tmp_path / "out"), "quantize", source, tmp_path / "out", "--preset", "rtn", "--overwrite")
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}


@pytest.mark.parametrize("text", ["", "a few words"])
def test_calibration_text_that_is_too_short_writes_nothing(
    source: Path, recipe: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "text.txt").write_text(text)
    refused("tokens found, 128 needed", "quantize", source, tmp_path / "out", "--recipe", recipe,
            "--calibration", tmp_path / "text.txt")  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_failed_run_keeps_the_checkpoint_it_was_to_replace(
    checkpoint: Path, source: Path, recipe: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    shard = broken / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-2:] = b"\xc0\x7f"  # the last weight becomes NaN
    shard.write_bytes(data)
    before = contents(output)
    refused("is nan", "quantize", broken, output, "--recipe", recipe, "--overwrite")
    assert contents(output) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken", "out"]


@pytest.mark.parametrize("command", ["quantize", "verify", "inspect", "eval"])
def test_folder_that_is_not_there_is_named(command: str, tmp_path: Path) -> None:
    missing = tmp_path / "no-such-model"
    if command == "verify":
        done = infoquant(command, missing)
        assert done.exit_code == 1
        assert "no such file" in done.stdout
        return
    refused("no-such-model", command, missing, *([tmp_path / "out"] if command == "quantize" else []))


def test_unknown_preset_is_refused_with_the_known_ones(source: Path, tmp_path: Path) -> None:
    refused("quarot", "quantize", source, tmp_path / "out", "--preset", "fastest")


def test_unquantized_model_is_no_checkpoint(source: Path) -> None:
    refused("no quantization_config; run `infoquant quantize`", "inspect", source)


@pytest.mark.parametrize("target", ["{file}/out", "/proc/out", "{folder}/" + 240 * "a"])
@pytest.mark.parametrize("command", ["quantize", "quantize --resume", "sample", "report"])
def test_target_that_cannot_be_written_is_refused_before_any_work(
    command: str, target: str, source: Path, recipe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    out = Path(target.format(file=tmp_path / "file", folder=tmp_path))
    arguments: dict[str, tuple[object, ...]] = {
        "quantize": ("quantize", source, out, "--recipe", recipe),
        "quantize --resume": ("quantize", source, out, "--recipe", recipe, "--resume"),
        "sample": ("sample", source, out.with_suffix(".safetensors")),
        "report": ("report", checkpoint, "--output", out.with_suffix(".html")),
    }
    done = infoquant(*arguments[command])
    assert done.exit_code == 1
    assert f"error: {out}" in done.stderr
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def ended_by(number: int, *arguments: object) -> tuple[int, str]:
    """Return exit code and last line of a run that got a signal while it sampled its calibration text."""
    command = [*INFOQUANT, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("calibration")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    return process.returncode, said.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_signal_leaves_nothing_behind(number: int, source: Path, tmp_path: Path) -> None:
    """The test of interrupted resumable runs sends SIGTERM."""
    code, said = ended_by(number, "quantize", source, tmp_path / "out")
    assert (code, said) == (128 + number, "stopped; no output was written")
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_compiled_code_makes_of_an_interruption_is_told_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("offline.signals._received", [Terminated(signal.SIGHUP)])
    error = ValueError("TypedStorage")
    error.add_note("out.resume keeps finished steps")
    with pytest.raises(typer.Exit) as ended, refusals():
        raise error
    assert ended.value.exit_code == 128 + signal.SIGHUP
    assert capsys.readouterr().err == "stopped; out.resume keeps finished steps\n"


def test_interrupted_resumable_run_says_what_it_keeps(source: Path, tmp_path: Path) -> None:
    code, said = ended_by(signal.SIGTERM, "quantize", source, tmp_path / "out", "--resume")
    assert code == 128 + signal.SIGTERM
    assert said.startswith(f"stopped; {tmp_path / 'out.resume'} keeps finished steps")
    assert [path.name for path in tmp_path.iterdir()] == ["out.resume"]


def test_version_names_tool_and_vllm() -> None:
    done = infoquant("--version")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["infoquant-vllm", "vllm"]
    assert metadata.version("vllm") in done.stdout


def test_evaluation_of_few_tokens_is_one_window_of_them(source: Path) -> None:
    done = infoquant("eval", source, "--tokens", 100, "--json")
    assert done.exit_code == 0, done.stderr
    assert (json.loads(done.stdout)["windows"], json.loads(done.stdout)["window"]) == (1, 100)
    refused("100 tokens make no window of 200: ask for at least 200 tokens",
            "eval", source, "--tokens", 100, "--window", 200)  # fmt: skip


def test_sample_creates_the_folder_of_its_file(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "tokens.safetensors"
    assert infoquant("sample", source, file, "--sequences", 1, "--length", 8).exit_code == 0
    assert file.is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--target-bits", 4.5, "--max-kl", 0.1],
            "--target-bits and --max-kl: give one of --target-bits, --max-kl, --fit",
        ),
        (["--fit", "24GB"], "--context, the tokens that the KV cache holds, goes with --fit"),
        (["--context", "64k"], "no budget: give one of --target-bits, --max-kl, --fit"),
        (["--fit", "much", "--context", "64k"], "--fit is 'much', expected a number"),
        (["--target-bits", 5, "--preset", "kv4"], "a budget does not go with rounding 'none'"),
        (["--target-bits", 3.5, "--dry-run"], "--target-bits 3.5: the least that these formats reach is 4."),
    ],
)
def test_budgets_that_cannot_be_are_refused(source: Path, options: list[object], message: str) -> None:
    refused(message, "quantize", source, source.with_name("none"), *options)
    assert not source.with_name("none").exists()
