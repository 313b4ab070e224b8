"""The figures of README.md and docs/performance.md are those of the result files."""

from benchmarks import overview
from benchmarks.common.models import ROOT
from benchmarks.readme import AMX, RESULTS, presets, tables


def test_the_documents_hold_every_table_as_the_command_prints_it() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    printed = tables(RESULTS) + tables(RESULTS / AMX)
    assert len(printed) == len(list(RESULTS.rglob("*.json")))
    for table in printed:
        assert table in text, f"run `python -m benchmarks.readme`; docs/performance.md lacks:\n{table}"
    assert presets(RESULTS) in (ROOT / "README.md").read_text(), "run `python -m benchmarks.readme`"


def test_the_picture_is_drawn_from_the_result_files() -> None:
    assert overview.draw(RESULTS) == overview.PICTURE.read_text(), "run `python -m benchmarks.overview`"
