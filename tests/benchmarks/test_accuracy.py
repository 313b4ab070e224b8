"""Figures of the accuracy table are their definitions, and the table holds them all, failures too."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import run as accuracy
from benchmarks.accuracy.caches import divergence
from benchmarks.accuracy.figures import task_figures, text_figures
from benchmarks.accuracy.scores import Scores
from benchmarks.accuracy.simulation import WholeVocabulary
from benchmarks.accuracy.table import markdown, terminal_tables
from benchmarks.accuracy.tasks import TaskScores
from benchmarks.common.server import ServerError
from offline.evaluate.metrics import compare
from offline.model.source import Source
from tests.common.tiny import SIZES, VOCAB_SIZE, write_source


def task(right: list[float], standard_error: float = 0.25) -> TaskScores:
    scores = torch.tensor(right, dtype=torch.float64)
    return TaskScores("acc", scores, 1 + scores, standard_error)


def text_scores(nll: list[list[float]], top: dict[int, float]) -> Scores:
    return Scores(torch.tensor(nll, dtype=torch.float64), [[top] * len(window) for window in nll])


def test_task_figures_are_means_over_items_with_paired_differences() -> None:
    found = task_figures(
        {"first": task([1, 0, 0, 0]), "second": task([1, 0], 0.5)},
        {"first": task([1, 1, 0, 0]), "second": task([1, 1])},
    )
    first, second = found["tasks"]["first"], found["tasks"]["second"]
    assert (first["score"], second["score"]) == (0.25, 0.5)
    assert (first["score_se"], second["score_se"]) == (0.25, 0.5)  # as lm-eval says
    assert first["difference"] == -0.25
    assert first["difference_se"] == pytest.approx(0.25)  # of 0, -1, 0, 0
    assert first["bits_per_byte"] == pytest.approx(1.25)
    mean = found["task_mean"]
    assert (mean["score"], mean["difference"]) == (0.375, -0.375)
    assert mean["score_se"] == pytest.approx(math.sqrt(0.25**2 + 0.5**2) / 2)


def test_a_reference_has_no_distance_to_itself() -> None:
    scores = text_scores([[1.0, 3.0], [2.0, 4.0]], {0: -0.1})
    found = text_figures(None, scores)
    assert found == {"perplexity": pytest.approx(math.exp(2.5)), "perplexity_se": pytest.approx(math.exp(2.5) / 2)}
    assert "difference" not in task_figures({"one": task([1, 0])}, None)["task_mean"]


def test_text_figures_of_two_models() -> None:
    """Both list two tokens of which one is shared; all others are one event."""
    reference = text_scores([[1.0], [1.0]], {0: math.log(0.5), 1: math.log(0.25)})
    ours = text_scores([[1.0], [1.0]], {0: math.log(0.25), 2: math.log(0.5)})
    found = text_figures(reference, ours)
    assert found["kl_lower_bound"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert found["top1_agreement"] == 0.0


@torch.inference_mode()
def test_whole_vocabulary_is_what_comparing_the_models_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, since the second time the reference answers from memory."""
    folders = [write_source(tmp_path / str(seed), seed=seed) for seed in range(3)]
    reference, *others = (Source.open(folder).model(torch.float32) for folder in folders)
    monkeypatch.setattr("benchmarks.accuracy.simulation.load_simulated", lambda folder: others[int(folder.name) - 1])
    windows = torch.randint(3, VOCAB_SIZE, (3, 16), generator=torch.Generator().manual_seed(0))
    whole = WholeVocabulary(folders[0], windows)
    for folder, other in zip(folders[1:], others, strict=True):
        assert whole.kl(folder) == compare(list(windows), other, reference)["kl"]


def test_one_failing_checkpoint_leaves_the_others_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With servers that always give the same, or do not start: a folder named "broken" does not."""
    reference = write_source(tmp_path / "reference")
    items = tmp_path / "sciq.jsonl"
    items.write_text('{"context": "a", "choices": [" b", " c"], "label": 0}\n' * 10)
    text = tmp_path / "text.txt"
    text.write_text("some words of a text. " * 50)
    for name in ("good", "broken", "better"):
        (tmp_path / name).symlink_to(reference)

    def ask(folder: Path, inputs: accuracy.Inputs) -> accuracy.Served:
        if folder.name == "broken":
            raise ServerError(f"vllm serve {folder} exited with code 1")
        scores = text_scores([[1.0, 2.0], [2.0, 3.0]], {0: -0.5})
        return accuracy.Served(scores, {each.name: task([1, 0] * 5) for each in inputs.tasks})

    monkeypatch.setattr(accuracy, "ask", ask)
    other = Source.open(write_source(tmp_path / "other", seed=1)).model(torch.float32)
    monkeypatch.setattr("benchmarks.accuracy.simulation.load_simulated", lambda folder: other)
    checkpoints = [str(tmp_path / name) for name in ("good", "broken", "better")]
    measured = ["--text", str(text), "--tokens", "64", "--window", "32", "--tasks", str(items), "--items", "10"]
    output = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["accuracy", str(reference), *checkpoints, *measured, "--output", str(output)])
    with pytest.raises(SystemExit, match="1"):
        accuracy.main()
    assert "broken: vllm serve" in capsys.readouterr().err
    lines = (output / "accuracy.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [
        "reference",
        "good",
        "broken (failed: ServerError)",
        "better",
    ]
    assert sorted(file.name for file in output.iterdir()) == ["accuracy.json", "accuracy.md"]
    for file in ("accuracy.json", "accuracy.md"):
        assert str(tmp_path) not in (output / file).read_text()


def a_row(**changes: Any) -> dict[str, Any]:
    row = {
        "model": "w4",
        "perplexity": 6728.5,
        "perplexity_se": 1396.6,
        "top1_agreement": 0.6448,
        "top1_agreement_se": 0.0055,
        "kl_lower_bound": 0.4643,
        "kl_lower_bound_se": 0.013,
        "simulated_kl": 0.5509,
        "simulated_kl_se": 0.0185,
        "tasks": {
            "lambada": {
                "metric": "exact_match",
                "score": 0.29,
                "score_se": 0.02,
                "bits_per_byte": 1.234,
                "bits_per_byte_se": 0.1,
            }
        },
        "task_mean": {"score": 0.29, "score_se": 0.02, "difference": -0.04, "difference_se": 0.01},
        "bits_per_weight": 4.047,
        "multiply_adds": 1_000_000,
        "multiply_adds_added": 12_345,
        "quantizing_seconds": 196.4,
        "peak_memory_bytes": None,
        "text": "wikipedia.txt",
        "tokens": 16384,
        "window": 512,
        "top": 256,
        "items": {"lambada": 100},
        "commit": "abc",
        "device": "a machine",
        "date": "2026-01-01T00:00:00+00:00",
        "seed": 0,
    }
    return row | changes


def test_markdown_is_one_table_that_says_what_was_served_and_what_simulated() -> None:
    head, rule, line, *_ = markdown([a_row()]).splitlines()
    cells = dict(zip(head.split("|")[1:-1], line.split("|")[1:-1], strict=True))
    assert len(cells) == rule.count("---")
    assert {heading.strip(): cell.strip() for heading, cell in cells.items()} == {
        "model": "w4",
        "perplexity, served": "6728 ± 1397",
        "top-1 agreement, served": "0.645 ± 0.005",
        "KL ≥, served, top-256 tokens": "0.464 ± 0.013",
        "KL, simulated, whole vocabulary": "0.551 ± 0.018",
        "KL below that of w4": "-",
        "lambada, exact_match": "0.290 ± 0.020",
        "lambada, bits per byte": "1.23 ± 0.10",
        "mean of the tasks": "0.290 ± 0.020",
        "less the reference's": "-0.040 ± 0.010",
        "bits per weight": "4.05",
        "multiply-adds added per token": "12,345 (1.2%)",
        "quantizing, s": "196",
        "peak memory, GiB": "-",
    }


def test_kl_is_held_against_that_of_the_first_checkpoint() -> None:
    reference = {name: value for name, value in a_row(model="bf16").items() if not name.startswith("simulated_kl")}
    rows = [reference, a_row(model="base", simulated_kl=0.6), a_row(model="better", simulated_kl=0.45)]
    head, _, *lines = markdown(rows).splitlines()
    place = head.split(" | ").index("KL below that of base")
    assert [line.split(" | ")[place] for line in lines[:3]] == ["-", "-", "25.0%"]


def test_terminal_has_no_table_of_tasks_where_none_were_asked() -> None:
    rows = [a_row(tasks={}, task_mean={}, items={})]
    del rows[0]["tasks"]
    assert [table.title for table in terminal_tables(rows)] == ["distance to the reference", "costs"]


@pytest.mark.parametrize("size", ["granite", "gemma2"])
def test_caches_are_compared_by_the_logits_that_the_model_gives(tmp_path: Path, size: str) -> None:
    """Granite scales its logits, Gemma 2 caps them."""
    models = [
        Source.open(write_source(tmp_path / f"{seed}", seed, **SIZES[size])).model(torch.float32) for seed in (0, 1)
    ]
    ids = torch.randint(3, VOCAB_SIZE, (16,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        hidden = models[0].model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        theirs, ours = (model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1) for model in models)
    expected = (theirs.exp() * (theirs - ours)).sum(-1)
    torch.testing.assert_close(divergence(models[0], hidden, models[1], ids), expected, rtol=1e-4, atol=1e-6)
