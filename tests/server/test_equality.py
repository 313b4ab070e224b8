"""A served model says the same however its work is cut up, and what the simulation says.

Greedy text cannot test this: near-ties flip. Negative log-probabilities (NLL) of given text can. The
model runs in float32, because logits in bf16 are 0.06 to 0.125 apart, far above what is asked here.
engine/test_bits.py has 8-bit codes, where the same limits are easier to hold.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.scores import Scores, kl_divergence, score
from benchmarks.common.server import Server, serve
from offline.evaluate.simulate import load_simulated

STEP_TOKENS = 768  # of which 4 windows of 512 make two and a half steps
TOP = 200
ARGUMENTS = ("--dtype", "float32", "--max-model-len", "1024", "--max-logprobs", str(TOP))


@pytest.fixture(scope="module")
def server(fast: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("eager") / "server.log"
    chunks = ("--max-num-batched-tokens", str(STEP_TOKENS))
    with serve(fast, log, "--enforce-eager", *chunks, *ARGUMENTS) as running:
        yield running


@pytest.fixture(scope="module")
def plain(server: Server, windows: torch.Tensor) -> Scores:
    """Eager, one whole window at a time."""
    return score(server, windows, TOP)


def mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


def test_served_is_what_the_simulation_computes(fast: Path, plain: Scores, windows: torch.Tensor) -> None:
    model = load_simulated(fast, torch.float32)
    with torch.no_grad():
        logits = torch.cat([model(window[None, :-1]).logits for window in windows]).double()
    simulated = scores_of(logits, windows)
    assert plain.nll.numel() >= 2000
    difference, divergence = mean_difference(simulated.nll, plain.nll), float(kl_divergence(simulated, plain).mean())
    print(f"mean |difference of NLL| {difference:.5f}, KL {divergence:.5f}")
    assert difference <= 0.01
    assert divergence <= 0.005


def test_a_batch_says_what_each_request_alone_says(server: Server, plain: Scores, windows: torch.Tensor) -> None:
    short = STEP_TOKENS // len(windows)  # so that all of them fit into one step
    together = score(server, windows[:, :short], top=1, concurrent=len(windows))
    assert mean_difference(together.nll, plain.nll[:, : short - 1]) <= 1e-3


def test_a_prompt_cut_into_chunks_says_the_same(server: Server, plain: Scores, windows: torch.Tensor) -> None:
    together = score(server, windows, top=1, concurrent=len(windows))
    assert mean_difference(together.nll, plain.nll) <= 1e-3


def test_a_cached_prefix_says_the_same(server: Server, plain: Scores, windows: torch.Tensor) -> None:
    """Single next tokens after ever longer prefixes, each of which finds most of itself in the cache."""
    lengths = range(100, windows.shape[1], 12)
    found = [[next_nll(server, window, length) for length in lengths] for window in windows]
    expected = plain.nll[:, [length - 1 for length in lengths]]
    assert cached_tokens(server) > 0.5 * len(windows) * sum(lengths)
    assert mean_difference(torch.tensor(found, dtype=torch.float64), expected) <= 1e-3


def test_compiled_says_what_eager_says(fast: Path, plain: Scores, windows: torch.Tensor, tmp_path: Path) -> None:
    with serve(fast, tmp_path / "server.log", *ARGUMENTS) as compiled:
        found = score(compiled, windows, top=1)
        with ThreadPoolExecutor(8) as pool:  # decoding, whose shapes are compiled apart from those of prompts
            after = list(pool.map(lambda length: next_nll(compiled, windows[0], length), range(64, 512, 16)))
    assert mean_difference(found.nll, plain.nll) <= 1e-3
    assert mean_difference(torch.tensor(after, dtype=torch.float64), plain.nll[0, 63:511:16]) <= 1e-3


def scores_of(logits: torch.Tensor, windows: torch.Tensor) -> Scores:
    """Scores from logits [windows, tokens - 1, vocabulary]."""
    logprobs = logits.log_softmax(-1)
    nll = -logprobs.gather(-1, windows[:, 1:, None]).squeeze(-1)
    values, tokens = logprobs.topk(TOP)
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return Scores(nll, [[dict(zip(t, v, strict=True)) for t, v in zip(*pair, strict=True)] for pair in pairs])


def next_nll(server: Server, window: torch.Tensor, length: int) -> float:
    """NLL of the token after the first `length` of a window, as a decoding step reports it."""
    token = int(window[length])
    choice = (
        server.client()
        .completions.create(
            model=str(server.model),
            prompt=window[:length].tolist(),
            max_tokens=1,
            logprobs=0,
            extra_body={"allowed_token_ids": [token]},  # reported log-probabilities are those before this mask
        )
        .choices[0]
    )
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs
    assert choice.logprobs.token_logprobs[0] is not None
    return -choice.logprobs.token_logprobs[0]


def cached_tokens(server: Server) -> float:
    """How many prompt tokens the server has found in its prefix cache so far."""
    return server.metric("vllm:prefix_cache_hits_total")
