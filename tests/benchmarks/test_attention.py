"""Benchmark of attention: every kernel runs on a case, and its row has the speed relative to bf16."""

import argparse

import pytest

from benchmarks.speed.attention import BASELINE, FALLBACK, NATIVE, Case, measure, table


@pytest.mark.parametrize("queries", [1, 96])
def test_every_kernel_is_timed_on_one_case(queries: int) -> None:
    rows = measure(Case("SmolLM2-135M", 96, queries), argparse.Namespace(seconds=0.0, seed=0))
    assert [row["kernel"] for row in rows] == [BASELINE, NATIVE, FALLBACK]
    assert rows[0]["speed_of_bf16"] == 1
    assert {row["phase"] for row in rows} == {"decode" if queries == 1 else "prefill"}
    assert table(rows).row_count == 3
