"""Tasks are scored by lm-eval over a server as by lm-eval in transformers."""

from pathlib import Path

import pytest

from benchmarks.accuracy.tasks import evaluate, served_model
from benchmarks.common.server import serve
from tests.benchmarks.test_tasks import read_all
from tests.common.tiny import write_source

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")  # of lm-eval[api]


def test_scores_over_a_server_are_those_of_transformers(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model = write_source(tmp_path / "source")
    tasks = read_all(tmp_path, model, count=30)
    expected = evaluate(HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=8), tasks)
    arguments = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "128")
    with serve(model, tmp_path / "server.log", *arguments) as server:
        found = evaluate(served_model(server, max_tokens=128), tasks)
    for name, scores in expected.items():
        assert found[name].right.tolist() == scores.right.tolist(), name
        assert found[name].bits_per_byte.tolist() == pytest.approx(scores.bits_per_byte.tolist(), rel=1e-4), name
