"""Read prompt log-probabilities of a served model over the OpenAI API, and compare two models by them."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from benchmarks.common.server import Server


@dataclass
class Scores:
    """A model's log-probabilities of the tokens of some windows, [windows, tokens - 1] positions.

    nll: float64, negative log-probability (nats) of the next token.
    top: for each window and position, the top-k tokens' log-probabilities by token id.
    """

    nll: torch.Tensor
    top: list[list[dict[int, float]]]

    def perplexity(self) -> float:
        """Return exp of the mean negative log-probability."""
        return math.exp(float(self.nll.mean()))


def score(server: Server, windows: torch.Tensor, top: int, concurrent: int = 1) -> Scores:
    """Score `windows` (int64 [windows, tokens]) by a server started with --max-logprobs >= `top`.

    top: k of the top-k tokens whose log-probabilities are kept.
    concurrent: requests in flight.
    """
    client = server.client()

    def positions(window: list[int]) -> list[dict[int, tuple[float, int]]]:
        """Return (log-probability, rank from 1) by token id for each position."""
        reply = client.completions.create(
            model=str(server.model), prompt=window, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": top}
        )
        found = (reply.choices[0].model_extra or {})["prompt_logprobs"][1:]
        return [{int(token): (entry["logprob"], entry["rank"]) for token, entry in place.items()} for place in found]

    with ThreadPoolExecutor(concurrent) as pool:
        replies = list(pool.map(positions, windows.tolist()))
    nll = [
        [-place[token][0] for place, token in zip(reply, window[1:], strict=True)]
        for reply, window in zip(replies, windows.tolist(), strict=True)
    ]
    kept = [[{t: p for t, (p, rank) in place.items() if rank <= top} for place in reply] for reply in replies]
    return Scores(torch.tensor(nll, dtype=torch.float64), kept)


def kl_divergence(reference: Scores, other: Scores) -> torch.Tensor:
    """Bound KL(reference || other) from below per position, float64 [windows, tokens - 1], nats.

    The tokens that are in both top-k lists count singly, all others as one event. By the data processing
    inequality this is a lower bound of the divergence over the whole vocabulary; it is close where the lists
    hold nearly all of the probability.
    """
    values = [
        [_kl(p, q) for p, q in zip(places, others, strict=True)]
        for places, others in zip(reference.top, other.top, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def same_first(reference: Scores, other: Scores) -> torch.Tensor:
    """Return 1.0 where both models have the same top-1 token, float64 [windows, tokens - 1]."""
    values = [
        [float(max(p, key=p.__getitem__) == max(q, key=q.__getitem__)) for p, q in zip(places, others, strict=True)]
        for places, others in zip(reference.top, other.top, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def standard_error(values: torch.Tensor) -> float:
    """Return the standard error of the mean of [windows, positions]; windows are the independent draws."""
    means = values.mean(dim=1)
    return float(means.std() / math.sqrt(len(means)))


def _kl(p: dict[int, float], q: dict[int, float]) -> float:
    shared = p.keys() & q.keys()
    listed = sum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    other_p = 1.0 - sum(math.exp(p[token]) for token in shared)
    other_q = 1.0 - sum(math.exp(q[token]) for token in shared)
    if other_p <= 0 or other_q <= 0:  # up to rounding the lists hold all of the probability
        return listed
    return listed + other_p * math.log(other_p / other_q)
