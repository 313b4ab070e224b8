"""`infoquant push` uploads a checkpoint that passes its checks, and nothing of one that fails."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offline import ToolError, quantize
from offline.cli.push import push
from offline.progress import silent
from tests.common.tiny import write_source


class Hub:
    """Record the calls to HfApi."""

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


def test_all_but_hidden_files_are_uploaded_to_a_new_repository(checkpoint: Path) -> None:
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


def test_checkpoint_that_fails_its_checks_is_not_uploaded(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    hub = Hub()
    with pytest.raises(ToolError, match=f"not uploaded, its check 'headers' failed: .*{shard.name}"):
        push(checkpoint, "organization/model", api=hub)  # type: ignore[arg-type]
    assert hub.calls == []


def test_wrong_name_and_refusal_of_the_hub_are_reported(checkpoint: Path) -> None:
    with pytest.raises(ToolError, match="expected a repository like organization/model"):
        push(checkpoint, "model", api=Hub())  # type: ignore[arg-type]
    with pytest.raises(ToolError, match=r"the hub refused .* \(401 Unauthorized\)"):
        push(checkpoint, "organization/model", api=Hub(OSError("401 Unauthorized\nmore")))  # type: ignore[arg-type]
    with pytest.raises(ToolError, match=r"the hub refused .* \(TimeoutError\)"):
        push(checkpoint, "organization/model", api=Hub(TimeoutError()))  # type: ignore[arg-type]
