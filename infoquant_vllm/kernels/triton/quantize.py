"""The activation quantizer on values in registers: formulas of kernels/reference/rotate_quantize.py, bit by bit."""

import triton
import triton.language as tl

from infoquant_vllm.kernels.triton.extremes import maximum, minimum

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it is rounded to a whole number, ties to even


@triton.jit
def round_whole(value):
    """value float32 plus 1.5 * 2^23, whose low bits are the nearest whole number of |value| < 2^22."""
    return value + _ROUND


@triton.jit
def grid(low, high, clip_ptr, group, mask, NUM_BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """(scale, 1 / scale, zero) float32 of ranges low..high; clip_ptr [groups, 2] factors on both ends.

    16 bits are symmetric, unclipped and have 32767 steps to the largest magnitude. Of a range that is NaN the scale is
    too, so that whatever is multiplied with it becomes NaN, as the reference has it.
    """
    low, high = minimum(low, 0.0), maximum(high, 0.0)
    if NUM_BITS != 16:
        low *= tl.load(clip_ptr + 2 * group, mask, other=0)
        high *= tl.load(clip_ptr + 2 * group + 1, mask, other=0)
    if SYMMETRIC:
        largest: tl.constexpr = 2.0 ** (NUM_BITS - 1) - 1
        scale = maximum(tl.div_rn(maximum(-low, high), largest), 1e-12)
        inverse = tl.div_rn(1.0, scale)
        zero = tl.zeros_like(scale) + 2.0 ** (NUM_BITS - 1)
    else:
        steps: tl.constexpr = 2.0**NUM_BITS - 1
        scale = maximum(tl.div_rn(high - low, steps), 1e-12)
        inverse = tl.div_rn(1.0, scale)
        zero = round_whole(-low * inverse) - _ROUND
    return scale, inverse, zero


@triton.jit
def stored_codes(y, inverse, zero, NUM_BITS: tl.constexpr):
    """int32 of y: at 4 bits code - zero, else code - 2^(NUM_BITS - 1)."""
    bound = _ROUND - zero
    code = tl.minimum(tl.maximum(round_whole(y * inverse), bound), bound + (2.0**NUM_BITS - 1))
    if NUM_BITS != 4:
        code += zero - 2.0 ** (NUM_BITS - 1)
    return code.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def store_rows(scale_ptr, rest_ptr, scale, zero, group, m, mask, M, NUM_BITS: tl.constexpr):
    """scale and, where there is a rest, zero - 128 into row `group` of [groups, M]; at 16 bits those of both bytes."""
    if NUM_BITS == 16:
        place = (group * M + m) * 2
        tl.store(scale_ptr + place, scale * 256, mask)
        tl.store(scale_ptr + place + 1, scale, mask)
        tl.store(rest_ptr + place, tl.zeros_like(scale).to(tl.int32), mask)
        tl.store(rest_ptr + place + 1, tl.zeros_like(scale).to(tl.int32) - 128, mask)
    else:
        tl.store(scale_ptr + group * M + m, scale, mask)
        if rest_ptr is not None:
            tl.store(rest_ptr + group * M + m, zero.to(tl.int32) - 128, mask)
