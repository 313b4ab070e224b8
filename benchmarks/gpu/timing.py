"""Times of calls in a CUDA graph, as vLLM replays them, with weights that the L2 cache does not hold."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

L2_BYTES = 64 << 20
"""At least as much as the L2 cache of any GPU here."""
REPEAT, REPLAYS = 8, 5
MOST_COPIES = 16


def copies(nbytes: int, device: str) -> int:
    """Return how many tensors of `nbytes` must take turns so that none is still in the L2 cache."""
    return 1 if device == "cpu" else max(1, min(MOST_COPIES, math.ceil(L2_BYTES / nbytes)))


def microseconds(calls: Sequence[Callable[[], Any]], device: str, repeat: int = REPEAT) -> float | None:
    """Return the median time of a call; `calls` take turns in one graph. On a CPU they run once, untimed."""
    if device == "cpu":
        for call in calls:
            call()
        return None
    number = max(repeat, len(calls))
    graph = _captured([calls[index % len(calls)] for index in range(number)])
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / number)
    return sorted(times)[REPLAYS // 2]


def _captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """Return a graph of `calls`, each of which ran outside of it before: the first call compiles."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
