"""A short `benchmarks.speed.load`: preempted, aborted and refused requests beside others, which go on; a kill."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from benchmarks.common.server import Server, serve
from benchmarks.speed.load import SERVED, SMALL_CACHE, load, make_requests
from offline import PRESETS, quantize
from offline.progress import silent
from tests.common.tiny import SIZES, write_source
from tests.offline.model.test_architectures import SMALL


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


def test_when_the_engine_is_killed_every_request_ends_and_no_process_stays(server: Server) -> None:
    """The last test of this server."""
    end = time.monotonic() + 120

    def ask(number: int) -> int | None:
        """Ask again and again until an answer fails, so that requests run whenever the engine is killed."""
        prompt, client = [3 + number] * 8, server.client()
        while time.monotonic() < end:
            try:
                client.completions.create(
                    model=str(server.model), prompt=prompt, max_tokens=300, extra_body={"ignore_eos": True}
                )
            except openai.APIStatusError as error:
                return error.status_code
            except openai.APIConnectionError:
                return None
        return 200

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number) for number in range(8)]
        deadline = time.monotonic() + 60
        while not server.metric("vllm:num_requests_running"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (engine,) = [member for member in server.members() if "EngineCore" in " ".join(member.cmdline())]
        engine.kill()
        answers = [each.result(timeout=90) for each in asked]
    print(answers)
    assert set(answers) <= {500, None}  # None: the connection was closed
    assert server.gone_within(60)
