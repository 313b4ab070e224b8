"""The figures of README.md and docs/speed.md are those of the result files."""

from benchmarks.common.models import ROOT
from benchmarks.readme import AMX, RESULTS, tables


def test_the_documents_hold_every_table_as_the_command_prints_it() -> None:
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/speed.md"))
    printed = tables(RESULTS) + tables(RESULTS / AMX)
    assert len(printed) == len(list(RESULTS.rglob("*.json")))
    for table in printed:
        assert table in text, f"run `python -m benchmarks.readme`; in neither:\n{table}"
