"""KL divergence between the predictions of two models, without holding their logits in memory."""

from typing import Any, NamedTuple

import torch
from torch.autograd import Function
from torch.nn import functional

CHUNK_POSITIONS = 128
"""Positions whose logits are held at once: bounds peak memory, which malloc keeps between chunks for vocabularies of up
to 65,536 tokens and else returns to the system each time."""


class Head(NamedTuple):
    """From hidden states to logits.

    weight: [vocab, hidden] float32, of lm_head
    scaling: divides its outputs
    soft_cap: an output x counts as soft_cap * tanh(x / soft_cap) (Gemma 2, 2024, section 2); None: as it is
    """

    weight: torch.Tensor
    scaling: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., vocab] of hidden [..., hidden] float32."""
        return self.scaled(functional.linear(hidden, self.weight))

    def scaled(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits for the outputs of lm_head."""
        logits = logits if self.scaling == 1 else logits / self.scaling
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def gradient(self, to_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the gradient [..., hidden] for hidden states from `to_logits`, that for their `logits`."""
        if self.soft_cap is not None:
            to_logits = to_logits * (1 - (logits / self.soft_cap).square())
        return (to_logits if self.scaling == 1 else to_logits / self.scaling) @ self.weight


def kl_of_heads(hidden: torch.Tensor, target: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the mean KL(softmax(logits of target) || softmax(logits of hidden)) in nats; gradients go to hidden alone.

    hidden, target: [positions, hidden] float32
    """
    return _HeadKL.apply(hidden, target, head)


def log_probabilities(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the log-probabilities [positions, vocab] of hidden [positions, hidden] float32."""
    return torch.cat([_log_softmax(head.logits(chunk)) for chunk in hidden.split(CHUNK_POSITIONS)])


def kl_to(expected: torch.Tensor, hidden: torch.Tensor, head: Head) -> float:
    """Return the mean KL of predictions from `hidden` to `expected`, which `log_probabilities` returned."""
    chunks = zip(expected.split(CHUNK_POSITIONS), hidden.split(CHUNK_POSITIONS), strict=True)
    total = 0.0
    for log_p, chunk in chunks:
        log_q = _log_softmax(head.logits(chunk))
        total += _expectation(log_p.exp(), log_q.neg_().add_(log_p)).item()
    return max(0.0, total / len(hidden))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.logsumexp(-1, keepdim=True)


def _expectation(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the sum over positions of the mean under p of values, float64; both are [positions, vocab]."""
    return torch.linalg.vecdot(p, values).double().sum()


class _HeadKL(Function):
    """Compute value and gradient in one pass, a chunk of positions at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, target: torch.Tensor, head: Head) -> torch.Tensor:
        total, gradients = hidden.new_zeros((), dtype=torch.float64), []
        for ours, theirs in zip(hidden.split(CHUNK_POSITIONS), target.split(CHUNK_POSITIONS), strict=True):
            logits = head.logits(ours)
            log_p, log_q = _log_softmax(head.logits(theirs)), _log_softmax(logits)
            p = log_p.exp()
            total += _expectation(p, log_p.sub_(log_q))
            gradients.append(head.gradient(log_q.exp_().sub_(p), logits))
        ctx.save_for_backward(torch.cat(gradients).div_(len(hidden)))
        return (total / len(hidden)).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradients[0], None, None
