"""Least and greatest numbers that are NaN where one of the numbers is, as torch's are: Triton's own drop it."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def minimum(a, b):
    """The smaller of a and b, NaN where either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    """The larger of a and b, NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amin(x, AXIS: tl.constexpr):
    """The smallest of x along an axis, NaN where one is: an instruction for each, as of the minimum that drops it."""
    if _INTERPRETED:  # where a reduction of our own takes seconds
        return tl.min(x, AXIS) + tl.sum(tl.where(x == x, 0.0, x), AXIS)
    return tl.reduce(x, AXIS, minimum)


@triton.jit
def amax(x, AXIS: tl.constexpr):
    """The largest of x along an axis, NaN where one is; see `amin`."""
    if _INTERPRETED:
        return tl.max(x, AXIS) + tl.sum(tl.where(x == x, 0.0, x), AXIS)
    return tl.reduce(x, AXIS, maximum)
