"""Learning-rate schedules, as shares of the learning rate at a step."""

import math

WARMUP_START = 0.01
COSINE_END = 1e-3


def cosine(step: int, steps: int) -> float:
    """Return half a cosine over `steps`, from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def warmup_cosine(step: int, warmup_steps: int, steps: int) -> float:
    """Return a linear warm-up from 1 / warmup_steps, times `cosine`."""
    return min(1.0, (step + 1) / warmup_steps) * cosine(step, steps)


def floored_warmup_cosine(step: int, warmup_steps: int, steps: int) -> float:
    """Return a linear warm-up from 0.01, times a cosine down to 0.001, as InfoQuant's learned clipping has it."""
    warmup = min(1.0, WARMUP_START + (1 - WARMUP_START) * step / warmup_steps)
    return warmup * (COSINE_END + (1 - COSINE_END) * cosine(step, steps))
