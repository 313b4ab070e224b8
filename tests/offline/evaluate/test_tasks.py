"""`evaluate_tasks` runs lm-eval on sources and simulated checkpoints, from task files without network."""

import errno
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional
from transformers import AutoTokenizer
from typer.testing import CliRunner

import offline
from offline.cli.main import app
from offline.errors import ToolError
from offline.evaluate.page.make import make_page
from offline.evaluate.saved_scores import read_evaluations, save_evaluations
from offline.evaluate.simulate import load_simulated
from offline.evaluate.task_options import TaskOptions
from offline.evaluate.tasks import TaskEvaluation, TaskScore, evaluate_tasks
from offline.model.reference import load_reference
from offline.progress import silent
from tests.common.tiny import write_source

CHOICES = (" is even.", " is odd.", " is a prime number.")
ITEMS = [{"question": f"The number {n}", "label": n % 3} for n in range(7)]


def write_task(folder: Path, **fields: object) -> Path:
    """Write a task of lm-eval and its data."""
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    task = {
        "task": "numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": list(CHOICES),
        "doc_to_target": "label",
        "target_delimiter": "",
        "num_fewshot": 0,
    }
    file = folder / "numbers.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in (task | fields).items() if value is not None}))
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("tasks") / "source")


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    folder = source.with_name("checkpoint")
    offline.quantize(source, folder, preset="rtn", progress=silent)
    return folder


@torch.no_grad()
def accuracy(model: torch.nn.Module, folder: Path) -> float:
    """Score the items without lm-eval: the choice of the largest log-probability."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for item in ITEMS:
        context = tokenizer(item["question"]).input_ids
        sums = []
        for choice in CHOICES:
            end = tokenizer(choice).input_ids
            logits = model(torch.tensor([context + end])).logits[0, len(context) - 1 : -1]
            sums.append(-functional.cross_entropy(logits.float(), torch.tensor(end), reduction="sum").item())
        right += sums.index(max(sums)) == item["label"]
    return right / len(ITEMS)


def test_a_task_file_scores_a_source_and_a_simulated_checkpoint(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path)
    for folder, model in (
        (source, load_reference(source, torch.float32)),
        (checkpoint, load_simulated(checkpoint, torch.float32)),
    ):
        found = evaluate_tasks(str(folder), [str(task)])
        score = next(score for score in found.scores if score.metric == "acc")
        expected = accuracy(model, folder)
        assert score.value == pytest.approx(expected)
        assert score.standard_error == pytest.approx(math.sqrt(expected * (1 - expected) / (len(ITEMS) - 1)))
        assert (score.task, score.items, found.simulated, found.served) == ("numbers", 7, folder == checkpoint, False)


def test_a_simulated_checkpoint_generates_and_limit_bounds_the_items(checkpoint: Path, tmp_path: Path) -> None:
    generate = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "exact_match"}],
    }
    task = write_task(tmp_path, **generate)
    score = evaluate_tasks(str(checkpoint), [str(task)], TaskOptions(limit=2)).scores[0]
    assert (score.metric, score.value, score.items) == ("exact_match", 0.0, 2)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no_such_task", "no_such_task: no task of lm-eval has this name"),
        ("missing.yaml", "missing.yaml: not readable as YAML"),
    ],
)
def test_an_unknown_task_is_refused_by_name(source: Path, task: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        evaluate_tasks(str(source), [task])


def test_an_endpoint_that_does_not_answer_is_refused_by_its_address(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="no OpenAI-compatible server answers"):
        evaluate_tasks(str(source), [str(write_task(tmp_path))], TaskOptions(endpoint="http://127.0.0.1:9"))


def scored(model: str, value: float, simulated: bool = False) -> TaskEvaluation:
    scores = [TaskScore(task="arc_easy", metric="acc", value=value, standard_error=0.01, items=50)]
    fields = {"served": False, "few_shot": None, "limit": 50, "seed": 0, "scores": scores}
    return TaskEvaluation.model_validate({"model": model, "simulated": simulated} | fields)


def test_a_checkpoint_keeps_its_latest_scores_in_a_file_and_on_its_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A card\n\nIts end.\n")
    assert read_evaluations(tmp_path) == []
    save_evaluations(tmp_path, [scored("m/source", 0.9)])
    latest = [scored("m/source", 0.6), scored("m/out", 0.5, simulated=True)]
    save_evaluations(tmp_path, latest)
    assert read_evaluations(tmp_path) == latest
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# A card\n\nIts end.\n")
    assert card.count("## Evaluation") == 1
    assert "| task | metric | items | source | out, simulated |" in card
    assert "| arc_easy | acc | 50 | 0.600 ± 0.010 | 0.500 ± 0.010 |" in card
    assert "0.900" not in card


def test_a_file_of_scores_that_is_none_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "infoquant_evaluation.json").write_text('[{"model": 1}]')
    with pytest.raises(ToolError, match=r"infoquant_evaluation\.json: "):
        read_evaluations(tmp_path)


def test_the_command_scores_checkpoint_and_source_and_saves_both_for_card_and_report(
    source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    task = write_task(tmp_path)
    done = CliRunner().invoke(app, ["eval", str(folder), "--reference", str(source), "--tasks", str(task), "--save"])
    assert done.exit_code == 0, done.stderr
    assert "checkpoint, simulated" in done.stdout
    assert [evaluation.model for evaluation in read_evaluations(folder)] == [str(source), str(folder)]
    make_page(folder, tmp_path / "page.html", progress=silent)
    assert '<h2 id="tasks">' in (tmp_path / "page.html").read_text()


def test_options_of_tasks_are_wrong_usage_without_tasks(checkpoint: Path) -> None:
    assert CliRunner().invoke(app, ["eval", str(checkpoint), "--limit", "3"]).exit_code == 2


def test_what_keeps_scores_from_being_compared_or_saved_is_refused_before_any_task_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("offline.evaluate.tasks.evaluate_tasks", lambda *_: pytest.fail("a task ran"))
    arguments = ["eval", str(checkpoint), "--tasks", str(write_task(tmp_path))]
    done = CliRunner().invoke(app, [*arguments, "--reference", str(tmp_path / "nowhere")])
    assert (done.exit_code, done.stderr.startswith(f"error: {tmp_path / 'nowhere'}: ")) == (1, True)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    done = CliRunner().invoke(app, [*arguments, "--save"])
    assert (done.exit_code, "infoquant_evaluation.json: cannot be written (Read-only" in done.stderr) == (1, True)
