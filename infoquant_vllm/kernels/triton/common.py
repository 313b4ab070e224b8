"""Device functions that the Triton kernels share (rounding, extremes, Hadamard, nibbles), and facts of the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from infoquant_vllm.format import hadamard_dense

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # as it was when the kernels were defined
MAGIC = tl.constexpr(1.5 * 2**23)
"""Added to a float32 of magnitude below 2^22, it leaves the nearest integer, ties to even, in the low bits."""
MAGIC_BITS = tl.constexpr(0x4B400000)  # the bits of MAGIC
NIBBLE_FACTOR = tl.constexpr(16)  # by which signed nibbles come out of `unpack_nibbles` too large

_LOW_SIGNED = tl.constexpr("{ .reg .b32 raised; shl.b32 raised, $1, 4; and.b32 $0, raised, 0xF0F0F0F0; }")
_HIGH_SIGNED = tl.constexpr("and.b32 $0, $1, 0xF0F0F0F0;")
_UNSIGNED = tl.constexpr("and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;")
_BYTE_0, _BYTE_2 = (tl.constexpr(f"prmt.b32 $0, $1, 0, 0x444{byte};") for byte in (0, 2))
_FOUR_OF_BYTE_1, _FOUR_OF_BYTE_3 = (tl.constexpr(f"prmt.b32 $0, $1, 0, 0x{4 * str(byte)};") for byte in (1, 3))
_MULTIPLY = "and.b32 code, code, 0x0F0F0F0F; mad.lo.u32 code, code, $2, $6; xor.b32 $0, code, 0x80808080; }"
_MULTIPLY_LOW = tl.constexpr("{ .reg .b32 code; mov.b32 code, $1; " + _MULTIPLY)
_MULTIPLY_HIGH = tl.constexpr("{ .reg .b32 code; shr.u32 code, $1, 4; " + _MULTIPLY)


@triton.jit
def unpack_nibbles(packed, SIGNED: tl.constexpr):
    """Unpack bytes to int8 low and high nibbles of their shape; SIGNED ones are multiplied by NIBBLE_FACTOR.

    A signed nibble in the upper half of a byte is its value times 16, which saves the sign extension. In PTX, four
    bytes at a time, because Triton shifts int8 one by one: 15 times the instructions in the main loop of a GEMM.
    """
    if INTERPRETED:  # it runs no PTX
        low, high = (packed << 4, packed & -16) if SIGNED else (packed & 15, packed >> 4)
        low, high = low.to(tl.int8), high.to(tl.int8)
    elif SIGNED:
        low = tl.inline_asm_elementwise(_LOW_SIGNED, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
        high = tl.inline_asm_elementwise(_HIGH_SIGNED, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    else:
        low, high = tl.inline_asm_elementwise(
            _UNSIGNED, "=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def multiply_nibbles(packed, word):
    """Unpack int8 [rows, bytes] to low and high nibbles, each as (nibble - zero) * multiplier, int8 alike.

    word: int32 [rows], as `prepare_linear` makes them. Four bytes at a time, which lie in a row: no sum of theirs
    reaches 256.
    """
    if INTERPRETED:
        code, word = packed.to(tl.int32), word[:, None]
        low = ((code & 15) * (word & 255) + (word >> 8 & 255) - 128).to(tl.int8)
        high = ((code >> 4 & 15) * (word >> 16 & 255) + (word >> 24 & 255) - 128).to(tl.int8)
    else:
        low = _multiply_nibbles(_MULTIPLY_LOW, packed, _byte(_BYTE_0, word), _byte(_FOUR_OF_BYTE_1, word))
        high = _multiply_nibbles(_MULTIPLY_HIGH, packed, _byte(_BYTE_2, word), _byte(_FOUR_OF_BYTE_3, word))
    return low, high


@triton.jit
def _byte(PTX: tl.constexpr, word):
    return tl.inline_asm_elementwise(PTX, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _multiply_nibbles(PTX: tl.constexpr, packed, multiplier, rest):
    """Of four bytes of a row in a register: the multiplier and the rest come in four registers alike."""
    operands = [packed, multiplier[:, None], rest[:, None]]
    return tl.inline_asm_elementwise(PTX, "=r,r,r,r,r,r,r,r,r,r", operands, dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def butterflies(y, LINES: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """Apply the unnormalized Hadamard transform to blocks of SIZE of y [LINES, BLOCKS * SIZE], in the format's order.

    Each of log2(SIZE) steps adds and subtracts neighbors, and writes sums to the first half, differences to the second:
    features twice as far apart become neighbors, and after the last step all are in place again. So every step is the
    same to the compiler, which goes through shared memory only where neighbors are in different threads.
    """
    size: tl.constexpr = SIZE
    for step in tl.static_range(16):
        if 2**step < size:
            a, b = tl.split(tl.reshape(y, (LINES, BLOCKS, SIZE // 2, 2)))
            y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (LINES, BLOCKS * SIZE))
    return y


@triton.jit
def hadamard_rows(
    x, hadamard_ptr, norm, ROWS: tl.constexpr, SIZE: tl.constexpr, ORDER: tl.constexpr, LOG_N: tl.constexpr
):
    """Apply the Hadamard of a head to x [ROWS, SIZE] float32: butterflies over 2**LOG_N features, then the base matrix.

    hadamard_ptr [ORDER, ORDER]; SIZE is a power of two, features beyond ORDER * 2**LOG_N are zeros and stay zeros;
    norm: 1 / sqrt(head size). Operation by operation `infoquant_vllm.format.apply_hadamard`, so that codes are the
    reference's where `enable_fp_fusion` is off.
    """
    N: tl.constexpr = 2**LOG_N
    PADDED: tl.constexpr = SIZE // N
    x = butterflies(x, ROWS, PADDED, N)
    if ORDER > 1:
        y = tl.reshape(x, [ROWS, PADDED, N])
        entries = tl.arange(0, PADDED)
        total = tl.zeros([ROWS, PADDED, N], tl.float32)
        for i in tl.static_range(ORDER):  # the format sums from left to right
            row = tl.load(hadamard_ptr + i * ORDER + entries, mask=entries < ORDER, other=0.0)
            entry = tl.sum(tl.where(entries[None, :, None] == i, y, 0.0), 1)
            total += row[None, :, None] * entry[:, None, :]
        x = tl.reshape(total, [ROWS, SIZE])
    return x * norm


@triton.jit
def once(y):
    """Return y, and keep the compiler from computing it again in another layout for another use."""
    if INTERPRETED:
        return y
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [y], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def minimum(a, b):
    """Return the smaller of a and b, NaN where either is: Triton's default drops NaN, torch's keeps it."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    """Return the larger of a and b, NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amin(x, AXIS: tl.constexpr):
    """Reduce x to its smallest along an axis, NaN where one is; one instruction each, as without NaN."""
    if INTERPRETED:  # where a custom reduction takes seconds
        return tl.min(x, AXIS) + tl.sum(tl.where(x == x, 0.0, x), AXIS)
    return tl.reduce(x, AXIS, minimum)


@triton.jit
def amax(x, AXIS: tl.constexpr):
    """Reduce x to its largest along an axis, NaN where one is; see `amin`."""
    if INTERPRETED:
        return tl.max(x, AXIS) + tl.sum(tl.where(x == x, 0.0, x), AXIS)
    return tl.reduce(x, AXIS, maximum)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Round x float32 to the nearest of DTYPE, ties to even; the interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return rounded.to(tl.float32, bitcast=True).to(DTYPE)
    return x.to(DTYPE)


def current_device() -> torch.device:
    """Return the device that kernels run on: the current GPU, or the CPU under the interpreter."""
    on_cpu = INTERPRETED.value or not torch.cuda.is_available()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def architecture(device: torch.device) -> int:
    """Return ten times a GPU's compute capability, 90 for 9.0; under the interpreter that of the oldest served."""
    if device.type == "cpu":
        return 80
    found = gpu_properties(device)
    return 10 * int(found.major) + int(found.minor)


def gpu_properties(device: torch.device) -> Any:
    """Return torch's properties of a GPU; a device without an index is the current one at this call."""
    return _properties(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


@cache
def base_matrix(size: int, device: torch.device) -> torch.Tensor:
    """Return the base matrix of a head's Hadamard, [order, order] float32, made once per device."""
    return hadamard_dense(size).to(device, torch.float32).contiguous()


def hadamard_sizes(size: int, enabled: bool) -> tuple[int, int]:
    """Return the order and butterfly steps of `hadamard_rows`; without a Hadamard 1 and 0."""
    if not enabled:
        return 1, 0
    order = len(hadamard_dense(size))
    return order, (size // order).bit_length() - 1


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 as float32, where VLLM_FLOAT32_MATMUL_PRECISION allows the 11 bits of TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
