"""What the demo prints for its reader to use."""

import json
import runpy
import shlex
from pathlib import Path

import pytest

from benchmarks import demo
from benchmarks.common.programs import DEMO_MODEL


def test_the_printed_request_can_be_pasted_from_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.console, "width", 40)
    model = Path("/a/rather/long/path/to/some/[models]/of mine/smollm2-w4a4kv4")
    demo.announce("http://127.0.0.1:60495", model)
    command = capsys.readouterr().out.split("For example:\n")[1].replace("\\\n", "")
    program, url, _, header, _, body = shlex.split(command)
    assert (program, url) == ("curl", "http://127.0.0.1:60495/v1/chat/completions")
    assert header == "Content-Type: application/json"
    assert json.loads(body)["model"] == str(model)


def test_demo_model_leaves_an_existing_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = DEMO_MODEL[-1]
    monkeypatch.setattr("sys.argv", [module, str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^error: {tmp_path}: exists already; remove it or give another folder$"):
        runpy.run_module(module, run_name="__main__")
    assert list(tmp_path.iterdir()) == []
