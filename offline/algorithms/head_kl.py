"""KL divergence between the predictions of two models, without holding their logits in memory."""

from typing import Any

import torch
from torch.autograd import Function
from torch.nn import functional

CHUNK_POSITIONS = 128
"""Positions whose logits are held at once: bounds peak memory, which malloc keeps between chunks for vocabularies of up
to 65,536 tokens and else returns to the system each time."""


def kl_of_heads(hidden: torch.Tensor, target: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(softmax(target head^T) || softmax(hidden head^T)) in nats; gradients go to hidden alone.

    hidden, target: [positions, hidden] float32; head: [vocab, hidden] float32
    """
    return _HeadKL.apply(hidden, target, head)


def log_probabilities(hidden: torch.Tensor, head: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return log softmax(hidden head^T / scaling), [positions, vocab]; hidden: [positions, hidden] float32."""
    return torch.cat([_log_softmax(chunk, head, scaling) for chunk in hidden.split(CHUNK_POSITIONS)])


def kl_to(expected: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor, scaling: float) -> float:
    """Return the mean KL of predictions from `hidden` to `expected`, which `log_probabilities` returned."""
    chunks = zip(expected.split(CHUNK_POSITIONS), hidden.split(CHUNK_POSITIONS), strict=True)
    total = 0.0
    for log_p, chunk in chunks:
        log_q = _log_softmax(chunk, head, scaling)
        total += _expectation(log_p.exp(), log_q.neg_().add_(log_p)).item()
    return max(0.0, total / len(hidden))


def _log_softmax(hidden: torch.Tensor, head: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    logits = functional.linear(hidden, head).div_(scaling)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _expectation(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the sum over positions of the mean under p of values, float64; both are [positions, vocab]."""
    return torch.linalg.vecdot(p, values).double().sum()


class _HeadKL(Function):
    """Compute value and gradient in one pass, a chunk of positions at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, target: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float64), []
        for ours, theirs in zip(hidden.split(CHUNK_POSITIONS), target.split(CHUNK_POSITIONS), strict=True):
            log_p, log_q = _log_softmax(theirs, head), _log_softmax(ours, head)
            p = log_p.exp()
            total += _expectation(p, log_p.sub_(log_q))
            gradients.append(log_q.exp_().sub_(p) @ head)
        ctx.save_for_backward(torch.cat(gradients).div_(len(hidden)))
        return (total / len(hidden)).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradients[0], None, None
