"""The Hadamard transform of rows held in registers, with the format's order of additions."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def butterflies(y, LINES: tl.constexpr, SIZE: tl.constexpr):
    """y [LINES, SIZE] through SIZE's butterflies, not normalized; SIZE a power of two.

    Neighbours meet, sums go to the first half and differences to the second: what was twice as far apart are
    neighbors then, and after the last step everything is back in its place. So every step looks the same to the
    compiler, which exchanges through shared memory only where the neighbors are not in one thread.
    """
    size: tl.constexpr = SIZE
    for step in tl.static_range(16):
        if 2**step < size:
            a, b = tl.split(tl.reshape(y, (LINES, SIZE // 2, 2)))
            y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (LINES, SIZE))
    return once(y)


@triton.jit
def once(y):
    """y itself, which the compiler will not compute again in another layout for another use of it."""
    if _INTERPRETED:
        return y
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [y], dtype=tl.float32, is_pure=False, pack=1)
