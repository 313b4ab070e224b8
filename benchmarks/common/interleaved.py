"""Time candidates interleaved, in one process on one thread.

Each call reads weights that the CPU's caches have lost since the candidate's last call. Times are CPU times of the
thread, so other work on the machine does not count.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from rich.table import Table

CACHE_BYTES = 2**28  # size of all copies of a candidate's weights; exceeds the CPU's caches
SECONDS = 4.0  # per candidate and shape
MIN_ROUNDS, MAX_ROUNDS = 5, 200

Candidate = Callable[[int], Any]
"""One call, on the copy of the weights with this number (counted up)."""


def copies(size: int) -> range:
    """Number the copies of weights of `size` bytes that are needed for none to stay in a cache."""
    return range(-(-CACHE_BYTES // size))


def time_interleaved(candidates: dict[str, Candidate], seconds: float) -> list[dict[str, Any]]:
    """Return a row per candidate: median, quartiles and minimum of its times, and ratios to the first candidate."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    count, started = 0, time.monotonic()
    while count < MIN_ROUNDS or (count < MAX_ROUNDS and time.monotonic() - started < seconds * len(candidates)):
        for name, run in candidates.items():
            start = time.thread_time()
            run(count)
            times[name].append((time.thread_time() - start) * 1e6)
        count += 1
    first = next(iter(times.values()))[1:]  # the first round warms up
    return [_row(name, taken[1:], first) for name, taken in times.items()]


def _row(name: str, times: list[float], first: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(times, n=4)
    return {
        "candidate": name,
        "median_us": round(median, 1),
        "quartiles_us": [round(low, 1), round(high, 1)],
        "lowest_us": round(min(times), 1),
        "over_first": round(median / statistics.median(first), 3),
        "lowest_over_first": round(min(times) / min(first), 3),
        "rounds": len(times),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Format the rows for a terminal."""
    printed = Table(title=f"{rows[0]['kernels']}, one thread, microseconds (median, quartiles, lowest)")
    for heading in ("tokens", "features", "channels", "candidate", "median", "quartiles", "lowest", "ratio"):
        printed.add_column(heading)
    for row in rows:
        low, high = row["quartiles_us"]
        numbers = f"{row['median_us']:.0f}", f"{low:.0f} to {high:.0f}", f"{row['lowest_us']:.0f}"
        sizes = (str(row[name]) for name in ("tokens", "features", "channels"))
        printed.add_row(*sizes, row["candidate"], *numbers, f"{row['over_first']:.2f}")
    return printed
