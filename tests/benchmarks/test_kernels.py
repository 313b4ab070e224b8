"""Benchmark of kernels: candidates are timed interleaved, and each row compares one with the first."""

import pytest

from benchmarks.common import interleaved
from benchmarks.common.interleaved import MIN_ROUNDS, table, time_interleaved
from benchmarks.speed import kernels


def test_candidates_are_interleaved_on_other_weights_each_time() -> None:
    calls: list[tuple[str, int]] = []
    candidates = {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}
    rows = time_interleaved(candidates, seconds=0)
    assert calls == [(name, i) for i in range(MIN_ROUNDS) for name in "ab"]
    assert [row["candidate"] for row in rows] == ["a", "b"]
    assert rows[0]["over_first"] == 1
    assert rows[0]["rounds"] == MIN_ROUNDS - 1
    assert all(row["lowest_us"] <= row["median_us"] <= row["quartiles_us"][1] for row in rows)
    assert (
        table([row | {"kernels": "native", "tokens": 1, "features": 64, "channels": 32} for row in rows]).row_count == 2
    )


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_every_operation_is_timed_beside_our_linear(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "CACHE_BYTES", 2**16)
    monkeypatch.setattr(kernels, "LINEAR_SHAPES", ((32, 128, 64),))
    monkeypatch.setattr(kernels, "ROTATE_TOKENS", (2,))
    monkeypatch.setattr(kernels, "ROTATE_CASES", (("Hadamard 128", 128, 64, 128, (), 1),))
    rows = kernels.OPERATIONS[operation](0)
    assert {row["operation"] for row in rows} == {operation}
    assert rows[0]["candidate"] == "int4_linear"
    assert len(rows) > 2
