"""README.md's figures are those of the result files."""

from benchmarks.models import ROOT
from benchmarks.page import RESULTS
from benchmarks.readme import tables


def test_every_table_of_figures_stands_in_the_readme_as_the_command_prints_it() -> None:
    text = (ROOT / "README.md").read_text()
    for table in tables(RESULTS):
        assert table in text, f"run `python -m benchmarks.readme`; not in README.md:\n{table}"
