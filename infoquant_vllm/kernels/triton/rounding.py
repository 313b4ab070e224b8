"""Rounding, where Triton's interpreter and its compiler differ or have no name for it."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x float32 to the nearest of DTYPE, ties to even; the interpreter's own conversion to bfloat16 cuts off."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return rounded.to(tl.float32, bitcast=True).to(DTYPE)
    return x.to(DTYPE)
