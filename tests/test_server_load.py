"""A short `benchmarks.load`: preempted, abandoned and refused requests beside others, which do not notice."""

from collections.abc import Iterator

import pytest

from benchmarks.load import SERVED, SMALL_CACHE, load, make_requests
from benchmarks.server import Server, serve
from offline import PRESETS, quantize
from offline.progress import silent
from tests.test_offline_architectures import SMALL
from tests.tiny import SIZES, write_source


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("load")
    recipe = PRESETS["fast"].model_copy(update=SMALL)
    quantize(write_source(folder / "source", **SIZES["tied"]), folder / "out", recipe=recipe, progress=silent)
    with serve(folder / "out", folder / "server.log", *SERVED, *SMALL_CACHE) as running:
        yield running


def test_a_server_under_load_answers_as_it_does_alone(server: Server) -> None:
    found = load(server, make_requests(300, vocabulary=256, seed=0), concurrent=32)
    print(found)
    assert found.problems == []
