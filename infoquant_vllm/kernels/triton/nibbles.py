"""Two 4-bit codes out of a byte, four bytes at a time.

A nibble in the upper half of an int8 is its signed value times 16, so that nothing extends signs: what is summed with
such bytes comes out times `FACTOR`.
"""

import triton
import triton.language as tl

FACTOR = 16
LOW = "{ .reg .b32 raised; shl.b32 raised, $1, 4; and.b32 $0, raised, 0xF0F0F0F0; }"
HIGH = "and.b32 $0, $1, 0xF0F0F0F0;"

_LOW, _HIGH = tl.constexpr(LOW), tl.constexpr(HIGH)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def unpack_nibbles(packed):
    """packed int8 to two int8 of its shape: signed low and signed high nibbles, each times FACTOR.

    Written out in PTX, which the interpreter cannot run, because Triton shifts int8 one by one: 15 times the
    instructions in the main loop of a product.
    """
    if _INTERPRETED:
        low = (packed << 4).to(tl.int8)
        high = (packed & -16).to(tl.int8)
    else:
        low = tl.inline_asm_elementwise(_LOW, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
        high = tl.inline_asm_elementwise(_HIGH, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    return low, high
