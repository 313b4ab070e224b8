"""The figures of README.md and docs/speed.md are those of the result files."""

from benchmarks.common.models import ROOT
from benchmarks.page import RESULTS
from benchmarks.readme import tables


def test_every_table_of_figures_stands_there_as_the_command_prints_it() -> None:
    text = "".join((ROOT / name).read_text() for name in ("README.md", "docs/speed.md"))
    for table in tables(RESULTS):
        assert table in text, f"run `python -m benchmarks.readme`; in neither:\n{table}"
