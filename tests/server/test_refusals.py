"""`vllm serve` refuses a bad checkpoint: a message that names what is wrong, a failed exit, nothing left running."""

from pathlib import Path

import pytest

from benchmarks.common.server import start
from tests.engine.test_refusals import CASES, write_spoiled


@pytest.mark.parametrize("name", ["truncated shard", "NaN scale"])
def test_a_bad_checkpoint_ends_the_server(name: str, tmp_path: Path) -> None:
    """The first is refused by the process that serves HTTP, the second by that of the engine."""
    case = CASES[name]
    folder = write_spoiled(tmp_path / "checkpoint", case.spoil)
    server = start(folder, tmp_path / "server.log", "--enforce-eager", "--skip-tokenizer-init")
    try:
        code = server.process.wait(timeout=240)
        gone = server.gone_within(20)
    finally:
        server.stop()
    log = server.log.read_text(errors="replace")
    assert code != 0
    assert gone
    for words in case.says:
        assert words in log, f"{words!r} is not in:\n{log[-3000:]}"
