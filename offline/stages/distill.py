"""Distill end to end: train parameters of the quantized model to predict as the source does.

The loss is KL(source || quantized) over the whole vocabulary at every position of the calibration
tokens, as in LLM-QAT (Liu et al., arXiv 2305.17888, section 3.2); the parameters are a factor for
each row of weights, and the clip ratios of keys and values. Codes stay as they were rounded.
"""

from typing import Any

import torch

from offline.algorithms.head_kl import kl_of_heads
from offline.algorithms.schedule import warmup_cosine
from offline.model.source import Source
from offline.progress import ProgressReport
from offline.recipe import Distillation
from offline.run import Run
from offline.training.student import Student

BETAS = (0.9, 0.95)


def distill(run: Run, student: Student, tokens: torch.Tensor, args: Distillation) -> None:
    """Train `student` in place on calibration tokens [sequences, length] int64."""
    order = _batches(len(tokens), args, torch.Generator().manual_seed(run.seed))
    tokens = tokens[: int(order.max()) + 1]
    targets = final_hidden(run.source, tokens, run.progress)
    optimizer = torch.optim.Adam(_groups(student, args), betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, args.warmup_steps, args.steps)
    )
    for step, rows in enumerate(order, start=1):
        hidden = student(tokens[rows])
        loss = kl_of_heads(hidden.flatten(0, 1), targets[rows].flatten(0, 1), student.head)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        student.clamp_clips()
        run.progress("distillation", step, args.steps, f"KL {loss.item():.3f}")


def _batches(sequences: int, args: Distillation, generator: torch.Generator) -> torch.Tensor:
    """Return the sequences of each step, [steps, batch]: the first ones, equally often, in random order."""
    needed = args.steps * args.batch_sequences
    used = min(sequences, needed)
    passes = [torch.randperm(used, generator=generator) for _ in range(-(-needed // used))]
    return torch.cat(passes)[:needed].view(args.steps, args.batch_sequences)


@torch.no_grad()
def final_hidden(source: Source, tokens: torch.Tensor, progress: ProgressReport) -> torch.Tensor:
    """Return the inputs of the source's lm_head, [sequences, length, hidden] float32."""
    decoder = source.model(torch.float32).model
    found = []
    for row, ids in enumerate(tokens):
        found.append(decoder(ids[None], use_cache=False).last_hidden_state)
        progress("targets", row + 1, len(tokens))
    return torch.cat(found)


def _groups(student: Student, args: Distillation) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups; parameters whose learning rate is 0 stay as they are."""
    student.requires_grad_(False)
    groups = []
    for parameters, rate in (
        (student.log_scales(), args.scale_learning_rate),
        (student.clips(), args.clip_learning_rate),
    ):
        if rate > 0:
            groups.append({"params": [p.requires_grad_() for p in parameters], "lr": rate})
    return groups
