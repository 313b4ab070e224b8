"""Two workers of tensor parallelism that live on for one model after another; vLLM starts its own for each model.

As when torchrun starts them, each process has an engine, which schedules the same and runs one worker.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

from benchmarks.common.server import free_port
from tests.common.engine import DEFAULTS, EngineError, Run, Tokens, prepare, run

WORKERS = 2
SECONDS = 240  # of which a model takes 5: where one fails the other may wait forever


class Workers:
    """Load models together, one at a time."""

    def __init__(self, pools: list[Pool]):
        self._pools = pools

    def run(
        self,
        model: Path,
        prompts: list[Tokens],
        max_tokens: int = 1,
        adapters: Sequence[Path | None] = (),
        **options: Any,
    ) -> Run:
        """Answer a batch of prompts as Engine.run does; raises EngineError with what any of them raises."""
        options = DEFAULTS | options | {"tensor_parallel_size": WORKERS}
        options |= {"distributed_executor_backend": "tests.common.rank.Rank"}
        sampling = {"max_tokens": max_tokens, "logprobs": 0, "prompt_logprobs": 0}
        arguments = str(model), (prompts,), sampling, (), adapters, options
        port = free_port()
        waiting = [pool.apply_async(_run, (port, *arguments)) for pool in self._pools]
        for each in waiting:
            each.wait(SECONDS)
        if not any(each.ready() for each in waiting):
            raise EngineError(f"no worker has answered in {SECONDS * WORKERS} seconds")
        first, *others = [each.get() for each in sorted(waiting, key=lambda each: not each.ready())]
        assert all(other.answers == first.answers for other in others)
        return first


@contextmanager
def running_workers() -> Iterator[Workers]:
    """The workers' processes, ended with the block."""
    context = get_context("spawn")
    pools = [context.Pool(1, _prepare, (rank,)) for rank in range(WORKERS)]
    try:
        yield Workers(pools)
    finally:
        for pool in pools:
            pool.terminate()


def _prepare(rank: int) -> None:
    prepare({"RANK": str(rank)})


def _run(port: int, *arguments: Any) -> Run:
    os.environ["MASTER_PORT"] = str(port)
    return run(*arguments)
