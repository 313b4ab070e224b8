"""Benchmark of kernels: how contenders take turns, and what a row tells."""

from benchmarks.common.interleaved import MIN_ROUNDS, table, take_turns


def test_contenders_take_turns_on_ever_other_weights_and_are_told_over_the_first() -> None:
    calls: list[tuple[str, int]] = []
    contenders = {"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}
    rows = take_turns(contenders, seconds=0)
    assert calls == [(name, i) for i in range(MIN_ROUNDS) for name in "ab"]
    assert [row["contender"] for row in rows] == ["a", "b"]
    assert rows[0]["over_first"] == 1
    assert rows[0]["rounds"] == MIN_ROUNDS - 1
    assert all(row["lowest_us"] <= row["median_us"] <= row["quartiles_us"][1] for row in rows)
    assert (
        table([row | {"kernels": "native", "tokens": 1, "features": 64, "channels": 32} for row in rows]).row_count == 2
    )
