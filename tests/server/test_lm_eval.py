"""Tasks are scored by lm-eval over a server as by lm-eval in transformers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.accuracy.tasks import evaluate, served_model
from benchmarks.common.server import Server, serve
from offline.evaluate.task_options import TaskOptions
from offline.evaluate.tasks import evaluate_tasks
from tests.benchmarks.test_tasks import read_all
from tests.common.tiny import write_source
from tests.offline.evaluate.test_tasks import write_task

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")  # of lm-eval[api]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lm-eval")
    arguments = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128")
    with serve(write_source(folder / "source"), folder / "server.log", *arguments) as running:
        yield running


def test_scores_over_a_server_are_those_of_transformers(server: Server, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    tasks = read_all(tmp_path, server.model, count=30)
    expected = evaluate(HFLM(pretrained=str(server.model), dtype="float32", device="cpu", batch_size=8), tasks)
    found = evaluate(served_model(server, max_tokens=128), tasks)
    for name, scores in expected.items():
        assert found[name].right.tolist() == scores.right.tolist(), name
        assert found[name].bits_per_byte.tolist() == pytest.approx(scores.bits_per_byte.tolist(), rel=1e-4), name


@pytest.mark.parametrize("path", ["", "/v1"])
def test_an_endpoint_scores_what_the_model_scores_in_this_process(server: Server, path: str, tmp_path: Path) -> None:
    task, model = [str(write_task(tmp_path))], str(server.model)
    expected = evaluate_tasks(model, task)
    found = evaluate_tasks(model, task, TaskOptions(endpoint=f"{server.url}{path}"))
    assert (found.served, expected.served) == (True, False)
    assert found.scores == expected.scores
