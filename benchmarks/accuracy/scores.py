"""Prompt log-probabilities of a served model, over the OpenAI API, and what follows from them."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from benchmarks.common.server import Server


@dataclass
class Scores:
    """What a model says of the tokens of some windows, [windows, tokens - 1] positions.

    nll: float64, negative log-probability (nats) of the token that follows.
    likeliest: for every window and position, log-probability by token id of the likeliest tokens.
    """

    nll: torch.Tensor
    likeliest: list[list[dict[int, float]]]

    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(float(self.nll.mean()))


def prompt_logprobs(
    server: Server, prompts: list[list[int]], top: int, concurrent: int = 1
) -> list[list[dict[int, tuple[float, int]]]]:
    """What a server says of each prompt's tokens but the first, given those before them.

    Args:
        server: started with --max-logprobs >= top.
        prompts: token ids, at least one each.
        top: how many of the likeliest tokens to list beside the prompt's own.
        concurrent: how many requests are in flight at a time.

    Returns for every prompt and position (log-probability in nats, rank) by token id; rank 1 is the likeliest.
    """
    client = server.client()

    def positions(prompt: list[int]) -> list[dict[int, tuple[float, int]]]:
        reply = client.completions.create(
            model=str(server.model), prompt=prompt, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": top}
        )
        found = (reply.choices[0].model_extra or {})["prompt_logprobs"][1:]
        return [{int(token): (entry["logprob"], entry["rank"]) for token, entry in place.items()} for place in found]

    with ThreadPoolExecutor(concurrent) as pool:
        return list(pool.map(positions, prompts))


def score(server: Server, windows: torch.Tensor, top: int, concurrent: int = 1) -> Scores:
    """Score `windows` (int64 [windows, tokens]); the other arguments are those of `prompt_logprobs`."""
    replies = prompt_logprobs(server, windows.tolist(), top, concurrent)
    nll = [
        [-place[token][0] for place, token in zip(reply, window[1:], strict=True)]
        for reply, window in zip(replies, windows.tolist(), strict=True)
    ]
    likeliest = [[{t: p for t, (p, rank) in place.items() if rank <= top} for place in reply] for reply in replies]
    return Scores(torch.tensor(nll, dtype=torch.float64), likeliest)


def kl_divergence(reference: Scores, other: Scores) -> torch.Tensor:
    """KL(reference || other) per position, float64 [windows, tokens - 1], nats.

    Counted over the tokens that both list among their likeliest, and all others taken as one
    event: a lower bound of the divergence over the whole vocabulary (data processing), near it
    where the lists hold nearly all of the probability.
    """
    values = [
        [_kl(p, q) for p, q in zip(places, others, strict=True)]
        for places, others in zip(reference.likeliest, other.likeliest, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def same_first(reference: Scores, other: Scores) -> torch.Tensor:
    """1.0 where both models find the same token likeliest, float64 [windows, tokens - 1]."""
    values = [
        [float(max(p, key=p.__getitem__) == max(q, key=q.__getitem__)) for p, q in zip(places, others, strict=True)]
        for places, others in zip(reference.likeliest, other.likeliest, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def standard_error(values: torch.Tensor) -> float:
    """Standard error of the mean of [windows, positions], windows taken as the independent draws."""
    means = values.mean(dim=1)
    return float(means.std() / math.sqrt(len(means)))


def _kl(p: dict[int, float], q: dict[int, float]) -> float:
    shared = p.keys() & q.keys()
    listed = sum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    rest_p = 1.0 - sum(math.exp(p[token]) for token in shared)
    rest_q = 1.0 - sum(math.exp(q[token]) for token in shared)
    if rest_p <= 0 or rest_q <= 0:  # all of the probability is listed, up to rounding
        return listed
    return listed + rest_p * math.log(rest_p / rest_q)
