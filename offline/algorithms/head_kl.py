"""KL divergence between the predictions of two models, without holding their logits in memory."""

from typing import Any

import torch
from torch.autograd import Function
from torch.nn import functional

CHUNK_POSITIONS = 256
"""Positions whose logits are held at once; bounds peak memory."""
KL_CHUNK = 64
"""The same without gradients: memory of so many is kept between chunks, that of more goes back to the system."""


def kl_of_heads(hidden: torch.Tensor, target: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(softmax(target head^T) || softmax(hidden head^T)) in nats; gradients go to hidden alone.

    hidden, target: [positions, hidden] float32; head: [vocab, hidden] float32
    """
    return _HeadKL.apply(hidden, target, head)


def log_probabilities(hidden: torch.Tensor, head: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return log softmax(hidden head^T / scaling), [positions, vocab]; hidden: [positions, hidden] float32."""
    return torch.cat([_log_softmax(chunk, head, scaling) for chunk in hidden.split(KL_CHUNK)])


def kl_to(expected: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor, scaling: float) -> float:
    """Return the mean KL of predictions from `hidden` to `expected`, which `log_probabilities` returned."""
    total = 0.0
    for log_p, chunk in zip(expected.split(KL_CHUNK), hidden.split(KL_CHUNK), strict=True):
        log_q = _log_softmax(chunk, head, scaling)
        total += torch.linalg.vecdot(log_p.exp(), log_q.neg_().add_(log_p)).double().sum().item()
    return max(0.0, total / len(hidden))


def _log_softmax(hidden: torch.Tensor, head: torch.Tensor, scaling: float) -> torch.Tensor:
    logits = functional.linear(hidden, head).div_(scaling)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


class _HeadKL(Function):
    """Compute value and gradient in one pass, a chunk of positions at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, target: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        total, gradient = hidden.new_zeros(()), torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK_POSITIONS):
            chunk = slice(start, start + CHUNK_POSITIONS)
            log_q = functional.linear(hidden[chunk], head)
            log_p = functional.linear(target[chunk], head)
            log_q.sub_(log_q.logsumexp(-1, keepdim=True))
            log_p.sub_(log_p.logsumexp(-1, keepdim=True))
            p = log_p.exp()
            total += torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
            gradient[chunk] = log_q.exp_().sub_(p) @ head
        ctx.save_for_backward(gradient.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradients[0], None, None
