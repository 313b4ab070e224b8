"""Test a served model under load: a cache too small for its requests, client disconnects and oversized prompts.

Requests of mixed length come 32 at a time. The cache holds a few of them, so that vLLM preempts and recomputes some;
clients disconnect in the middle of an answer and send prompts that are too long. The exit code is 1 unless the only
errors are a 400 for each oversized prompt, each answer has the tokens and log-probabilities of the same request alone,
no request is left in the server, and its memory does not grow after the first fifth.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import openai
from rich.console import Console
from rich.table import Table

from benchmarks.common.provenance import provenance, write_rows
from benchmarks.common.server import Server, serve, stop_on_sigterm

LENGTHS = (4, 16, 64, 200)  # tokens of prompts
ANSWERS = (1, 8, 24, 64)  # tokens of answers
MAX_MODEL_LEN = 320
SERVED = ("--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN))
SMALL_CACHE = ("--block-size", "32", "--num-gpu-blocks-override", "40")
REPEATS = 10  # of each distinct request, among other requests each time
LARGEST_DIFFERENCE = 1e-3  # of log-probabilities, nats
LARGEST_GROWTH = 1.05  # factor of the server's memory


@dataclass(frozen=True)
class Request:
    """Token ids, tokens of the answer, and the streamed pieces after which the client disconnects (0: never)."""

    prompt: tuple[int, ...]
    max_tokens: int
    leaves_after: int = 0

    @property
    def too_long(self) -> bool:
        """Whether the server must refuse it."""
        return len(self.prompt) + self.max_tokens > MAX_MODEL_LEN


@dataclass(frozen=True)
class Answer:
    """The reply: ok (with tokens and log-probabilities), left, or the error's status and message."""

    kind: str
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Result:
    """The figures of a run; `problems` lists the conditions that do not hold."""

    requests: int
    answered: int
    refused: int
    left: int
    preemptions: float
    largest_difference: float
    memory_growth: float
    seconds: float
    problems: list[str]


def main() -> None:
    """Run, print a table and write --json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.load", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a checkpoint")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=256, help="prompts are of tokens 3 to this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    stop_on_sigterm()
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(options.model, Path(folder) / "log", *SERVED, *SMALL_CACHE) as server,
    ):
        requests = make_requests(options.requests, options.vocabulary, options.seed)
        found = load(server, requests, options.concurrent)
    Console().print(table(found))
    if options.json:
        write_rows([{"model": options.model.name} | asdict(found) | provenance(options.seed)], options.json)
    if found.problems:
        sys.exit("\n".join(found.problems))


def make_requests(count: int, vocabulary: int, seed: int) -> list[Request]:
    """Make `count` requests in random order: 1 in 20 is too long, 1 in 10 is aborted by its client, others repeat."""
    generator = random.Random(seed)

    def one(length: int, max_tokens: int, leaves_after: int = 0) -> Request:
        return Request(tuple(generator.randrange(3, vocabulary) for _ in range(length)), max_tokens, leaves_after)

    distinct = [one(generator.choice(LENGTHS), generator.choice(ANSWERS)) for _ in range(max(1, count // REPEATS))]
    oversized = [one(MAX_MODEL_LEN + generator.randrange(1, 2000), 8) for _ in range(max(1, count // 20))]
    leaving = [one(generator.choice(LENGTHS), 64, generator.randrange(1, 8)) for _ in range(max(1, count // 10))]
    repeated = count - len(oversized) - len(leaving)
    requests = [*oversized, *leaving, *(distinct[index % len(distinct)] for index in range(repeated))]
    generator.shuffle(requests)
    return requests


class Caller:
    """Send requests to a server, from any number of threads."""

    def __init__(self, server: Server):
        self._client, self._model = server.client(), str(server.model)

    def ask(self, request: Request) -> Answer:
        """Send a request; wait for its answer, or disconnect."""
        try:
            return self._leave(request) if request.leaves_after else self._whole(request)
        except openai.APIStatusError as error:
            clear = error.status_code == 400 and str(MAX_MODEL_LEN) in str(error)
            return Answer("400" if clear else f"{error.status_code} {error}")
        except openai.OpenAIError as error:
            return Answer(f"{type(error).__name__} {error}")

    def _whole(self, request: Request) -> Answer:
        reply = self._client.completions.create(
            model=self._model,
            prompt=list(request.prompt),
            max_tokens=request.max_tokens,
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        return Answer(
            "ok", tuple(logprobs.tokens or ()), tuple(p for p in logprobs.token_logprobs or () if p is not None)
        )

    def _leave(self, request: Request) -> Answer:
        stream = self._client.completions.create(
            model=self._model,
            prompt=list(request.prompt),
            max_tokens=request.max_tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        pieces = 0
        with stream:
            for pieces, _ in enumerate(
                stream, 1
            ):  # a busy server streams several tokens in a piece, and may be done first
                if pieces == request.leaves_after:
                    break
        return Answer("left" if pieces else "ended without a piece")


def load(server: Server, requests: list[Request], concurrent: int) -> Result:
    """Send each distinct request alone, then all requests, `concurrent` at a time."""
    began, caller = time.monotonic(), Caller(server)
    plain = list(dict.fromkeys(r for r in requests if not r.too_long and not r.leaves_after))
    expected = {request: caller.ask(request) for request in plain}
    first = len(requests) // 5
    with ThreadPoolExecutor(concurrent) as pool:
        answers = list(pool.map(caller.ask, requests[:first]))
        early = memory(server)
        answers += list(pool.map(caller.ask, requests[first:]))
    growth = memory(server) / early
    kinds = Counter(answer.kind for answer in answers)
    pairs = [
        (answer, expected[request]) for request, answer in zip(requests, answers, strict=True) if request in expected
    ]
    difference = max((_difference(*pair) for pair in pairs), default=0.0)
    preemptions = server.metric("vllm:num_preemptions_total")
    refused = sum(request.too_long for request in requests)
    left = sum(request.leaves_after > 0 for request in requests)
    problems = {
        f"answers: {dict(kinds)}, expected {len(pairs)} ok, {refused} of 400 and {left} left": kinds
        != Counter({"ok": len(pairs), "400": refused, "left": left}),
        f"log-probabilities {difference:.2g} from those of the request alone": difference > LARGEST_DIFFERENCE,
        "no request was preempted; raise --concurrent": preemptions == 0,
        f"memory grew to {growth:.3f} of what it was": growth > LARGEST_GROWTH,
        "requests are left in the server": not _idle_within(server, 30),
        "the server is not healthy": not server.is_healthy(),
    }
    seconds = time.monotonic() - began
    failed = [problem for problem, found in problems.items() if found]
    return Result(
        len(requests), kinds["ok"], kinds["400"], kinds["left"], preemptions, difference, growth, seconds, failed
    )


def memory(server: Server) -> int:
    """Return the resident bytes of the server's processes."""
    return sum(process.memory_info().rss for process in server.members())


def table(found: Result) -> Table:
    """Format the figures for a terminal."""
    printed = Table("", "found", title="A served model under load")
    for name, value in asdict(found).items():
        if name != "problems":
            printed.add_row(name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    return printed


def _difference(found: Answer, expected: Answer) -> float:
    """Return the largest difference of a log-probability; infinite if the tokens differ."""
    if found.tokens != expected.tokens:
        return float("inf")
    return max((abs(a - b) for a, b in zip(found.logprobs, expected.logprobs, strict=True)), default=0.0)


def _idle_within(server: Server, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(server.metric(f"vllm:num_requests_{kind}") for kind in ("running", "waiting")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


if __name__ == "__main__":
    main()
