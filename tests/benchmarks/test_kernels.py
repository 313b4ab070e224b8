"""Benchmark of kernels: how candidates take turns, and what a row tells."""

from benchmarks.common.interleaved import MIN_ROUNDS, table, time_interleaved


def test_candidates_time_interleaved_on_ever_other_weights_and_are_told_over_the_first() -> None:
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
