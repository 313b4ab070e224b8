"""A short `benchmarks.load`: preempted, abandoned and refused requests beside others, which do not notice."""

from pathlib import Path

from benchmarks.load import SERVED, SMALL_CACHE, load, make_requests
from benchmarks.server import serve
from offline import PRESETS, quantize
from offline.progress import silent
from tests.test_offline_architectures import SMALL
from tests.tiny import SIZES, write_source


def test_a_server_under_load_answers_as_it_does_alone(tmp_path: Path) -> None:
    recipe = PRESETS["fast"].model_copy(update=SMALL)
    quantize(write_source(tmp_path / "source", **SIZES["tied"]), tmp_path / "out", recipe=recipe, progress=silent)
    with serve(tmp_path / "out", tmp_path / "server.log", *SERVED, *SMALL_CACHE) as server:
        found = load(server, make_requests(300, vocabulary=256, seed=0), concurrent=32)
    print(found)
    assert found.problems == []
