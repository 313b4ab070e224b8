"""`infoquant push`: what passes its checks goes to the hub whole; nothing is sent of what does not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offline import ToolError, quantize
from offline.cli.push import push
from offline.progress import silent
from tests.common.tiny import write_source


class Hub:
    """What HfApi is asked."""

    def __init__(self, error: Exception | None = None):
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._error = error

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append((repository, options))
        if self._error is not None:
            raise self._error

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        self.calls.append(("upload", options))
        return SimpleNamespace(commit_url="https://hub/organization/model/commit/1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    quantize(write_source(tmp_path / "source"), tmp_path / "out", preset="rtn", progress=silent)
    return tmp_path / "out"


def test_every_file_but_hidden_ones_goes_to_a_repository_that_need_not_exist(checkpoint: Path) -> None:
    for name in ("additional_chat_templates/tools.jinja", "1_Pooling/config.json"):
        (checkpoint / name).parent.mkdir()
        (checkpoint / name).write_text("{}")
    visible = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
    (checkpoint / ".notes").write_text("mine")
    hub = Hub()
    sent = push(checkpoint, "organization/model", private=True, api=hub)  # type: ignore[arg-type]
    (repository, made), (_, uploaded) = hub.calls
    assert (repository, made["exist_ok"], made["private"]) == ("organization/model", True, True)
    assert set(uploaded["allow_patterns"]) == visible
    assert uploaded["folder_path"] == checkpoint
    assert (sent.files, sent.url) == (len(visible), "https://hub/organization/model/commit/1")


def test_nothing_is_sent_of_a_checkpoint_that_fails_its_checks(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    hub = Hub()
    with pytest.raises(ToolError, match=f"not sent, its check 'headers' failed: .*{shard.name}"):
        push(checkpoint, "organization/model", api=hub)  # type: ignore[arg-type]
    assert hub.calls == []


def test_wrong_name_and_a_hub_that_refuses_are_told(checkpoint: Path) -> None:
    with pytest.raises(ToolError, match="a repository like organization/model was expected"):
        push(checkpoint, "model", api=Hub())  # type: ignore[arg-type]
    with pytest.raises(ToolError, match=r"the hub did not take .* \(401 Unauthorized\)"):
        push(checkpoint, "organization/model", api=Hub(OSError("401 Unauthorized\nmore")))  # type: ignore[arg-type]
    with pytest.raises(ToolError, match=r"the hub did not take .* \(TimeoutError\)"):
        push(checkpoint, "organization/model", api=Hub(TimeoutError()))  # type: ignore[arg-type]
