"""A server takes turned LoRA adapters by name, at its start and later; others leave it as it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks.common.server import Server, serve
from offline import PRESETS, quantize
from offline.lora import turn_adapter
from offline.progress import silent
from tests.common.tiny import SIZES, write_adapter, write_source
from tests.offline.model.test_architectures import SMALL

LORA = ("--enable-lora", "--max-loras", "2", "--max-model-len", "256", "--dtype", "float32", "--enforce-eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its checkpoint at W4A4KV4, and an adapter as it is given and turned."""
    folder = tmp_path_factory.mktemp("lora")
    source = write_source(folder / "source", **SIZES["tied"])
    recipe = PRESETS["fast"].model_copy(update=SMALL | {"lm_head_bits": 8})
    quantize(source, folder / "checkpoint", recipe=recipe, progress=silent)
    turn_adapter(folder / "checkpoint", write_adapter(folder / "given", source), folder / "turned")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    modules, variables = ("--lora-modules", f"mine={folder / 'turned'}"), {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serve(folder / "checkpoint", folder / "server.log", *LORA, *modules, environment=variables) as running:
        yield running


def complete(server: Server, model: str) -> str:
    options: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return server.client().completions.create(model=model, prompt="Once upon a time", **options).choices[0].text


def load(server: Server, name: str, adapter: Path) -> None:
    body = {"lora_name": name, "lora_path": str(adapter)}
    server.client().post("/load_lora_adapter", body=body, cast_to=str)


def test_an_adapter_changes_the_answers_of_requests_that_name_it(server: Server) -> None:
    plain, adapted = complete(server, str(server.model)), complete(server, "mine")
    assert plain != adapted
    assert complete(server, str(server.model)) == plain


def test_an_adapter_is_loaded_while_the_server_runs(server: Server, folder: Path) -> None:
    load(server, "again", folder / "turned")
    assert complete(server, "again") == complete(server, "mine")


def test_an_adapter_that_is_not_turned_is_refused_and_the_server_stays(server: Server, folder: Path) -> None:
    expected = complete(server, "mine")
    with pytest.raises(openai.APIStatusError, match=r"in the basis of the source model.*run `infoquant lora"):
        load(server, "given", folder / "given")
    with pytest.raises(openai.NotFoundError, match="`given` does not exist"):
        complete(server, "given")
    assert complete(server, "mine") == expected
