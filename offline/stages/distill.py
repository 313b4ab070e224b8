"""End-to-end distillation: the quantized model's parameters trained to predict as the source does.

The loss is KL(source || quantized) over the whole vocabulary at every position of the calibration
tokens, as in LLM-QAT (Liu et al., arXiv 2305.17888, section 3.2); the parameters are a factor for
each row of weights, and the clips. Codes stay as they were rounded.
"""

import math
from typing import Any

import torch
from torch.autograd import Function
from torch.nn import functional

from offline.model.source import Source
from offline.progress import ProgressReport
from offline.recipe import Distillation
from offline.training.student import Student

POSITIONS_AT_A_TIME = 256
"""Of logits over the vocabulary: enough for fast products, few enough to stay small."""
BETAS = (0.9, 0.95)


def distill(
    student: Student,
    source: Source,
    tokens: torch.Tensor,
    args: Distillation,
    seed: int,
    progress: ProgressReport,
) -> None:
    """Train `student` in place on tokens [sequences, length] int64 that the source reads too."""
    order = _batches(len(tokens), args, torch.Generator().manual_seed(seed))
    tokens = tokens[: int(order.max()) + 1]
    targets = final_hidden(source, tokens, progress)
    optimizer = torch.optim.Adam(_groups(student, args), betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, args))
    for step, rows in enumerate(order, start=1):
        hidden = student(tokens[rows])
        loss = kl_of_heads(hidden.flatten(0, 1), targets[rows].flatten(0, 1), student.head)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        student.bound()
        progress("distillation", step, args.steps, f"KL {loss.item():.3f}")


def _batches(sequences: int, args: Distillation, generator: torch.Generator) -> torch.Tensor:
    """Which sequences each step reads, [steps, batch]: the first ones, all as often, in random order."""
    wanted = args.steps * args.batch_sequences
    used = min(sequences, wanted)
    passes = [torch.randperm(used, generator=generator) for _ in range(-(-wanted // used))]
    return torch.cat(passes)[:wanted].view(args.steps, args.batch_sequences)


@torch.no_grad()
def final_hidden(source: Source, tokens: torch.Tensor, progress: ProgressReport) -> torch.Tensor:
    """What the source's lm_head reads, [sequences, length, hidden] float32."""
    decoder = source.model(torch.float32).model
    found = []
    for row, ids in enumerate(tokens):
        found.append(decoder(ids[None], use_cache=False).last_hidden_state)
        progress("targets", row + 1, len(tokens))
    return torch.cat(found)


def kl_of_heads(hidden: torch.Tensor, target: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Mean KL(softmax(target head^T) || softmax(hidden head^T)), nats; gradients go to hidden alone.

    hidden, target: [positions, hidden] float32; head: [vocabulary, hidden] float32
    """
    return _HeadKL.apply(hidden, target, head)


class _HeadKL(Function):
    """Value and gradient in one pass over the vocabulary, a few positions at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, target: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        total, gradient = hidden.new_zeros(()), torch.empty_like(hidden)
        for start in range(0, len(hidden), POSITIONS_AT_A_TIME):
            part = slice(start, start + POSITIONS_AT_A_TIME)
            ours = functional.linear(hidden[part], head)
            theirs = functional.linear(target[part], head)
            ours.sub_(ours.logsumexp(-1, keepdim=True))
            theirs.sub_(theirs.logsumexp(-1, keepdim=True))
            shares = theirs.exp()
            total += torch.linalg.vecdot(shares, theirs.sub_(ours)).sum()
            gradient[part] = ours.exp_().sub_(shares) @ head
        ctx.save_for_backward(gradient.div_(len(hidden)))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradients[0], None, None


def _groups(student: Student, args: Distillation) -> list[dict[str, Any]]:
    student.requires_grad_(False)
    groups = []
    for parameters, rate in (
        (student.log_scales(), args.scale_learning_rate),
        (student.clips(), args.clip_learning_rate),
    ):
        if rate > 0:
            groups.append({"params": [p.requires_grad_() for p in parameters], "lr": rate})
    return groups


def _rate(step: int, args: Distillation) -> float:
    """Linear warm-up, then half a cosine to zero."""
    return min(1.0, (step + 1) / args.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
