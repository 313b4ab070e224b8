"""Starting vLLM on a GPU machine whose packages it was not released with: plainly, and with ever less of it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.common.server import Server, ServerError, serve
from benchmarks.gpu.bench import Bench

START_SECONDS = 150
FALLBACKS: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    ((), {}),
    (("--kernel-config", '{"enable_jit_warmup": false}'), {"VLLM_USE_AOT_COMPILE": "0"}),
    ((), {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
    (("--enforce-eager",), {}),
    ((), {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
)
"""Arguments and environment of each attempt, beside those of the attempts before it; the last shows a traceback."""


class Engines:
    """Servers one after the other; what one needed to start the next gets at once."""

    def __init__(self, bench: Bench, logs: Path):
        self.bench, self.logs, self.first = bench, logs, 0
        logs.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def served(self, name: str, model: Path, *arguments: str) -> Iterator[Server]:
        """Yield a server, after as many attempts as it takes; writes a row for each.

        Raises ServerError where none of them starts in the time that is left.
        """
        with ExitStack() as stack:
            yield self._started(stack, name, model, arguments)

    def _started(self, stack: ExitStack, name: str, model: Path, arguments: tuple[str, ...]) -> Server:
        error = ServerError(f"{model}: no time left to start a server")
        for attempt in range(self.first, len(FALLBACKS)):
            if self.bench.left() <= 0:
                break
            more, environment = fallback(attempt)
            facts = {"server": name, "arguments": [*arguments, *more], "environment": environment}
            began = time.monotonic()
            context = serve(
                model,
                self.logs / f"{name}-{attempt}.log",
                *arguments,
                *more,
                environment=environment,
                seconds=min(self.bench.left(), START_SECONDS),
            )
            try:
                server = stack.enter_context(context)
            except ServerError as caught:
                error = caught
                self.bench.row(**facts, problem=str(caught)[-1500:])
                continue
            self.first = attempt
            self.bench.row(**facts, start_seconds=time.monotonic() - began, kv_tokens=server.kv_tokens())
            return server
        raise error


def fallback(attempt: int) -> tuple[list[str], dict[str, str]]:
    """Return the arguments and the environment of an attempt, those before it included."""
    chosen = FALLBACKS[: attempt + 1]
    arguments = [argument for more, _ in chosen for argument in more]
    return arguments, {name: value for _, environment in chosen for name, value in environment.items()}
