"""Learning-rate schedules."""

import math


def cosine(step: int, steps: int) -> float:
    """Return half a cosine over `steps`, from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
