"""Input transform and activation quantiser of the compiled library; semantics: kernels/reference."""

from collections.abc import Callable
from functools import cache

import torch

from infoquant_vllm.format import hadamard_dense
from infoquant_vllm.kernels.native.library import DTYPES, POINTER, SIZE, function

NONE, HADAMARD, BLOCKS, KRONECKER = range(4)
INPUT = (POINTER, SIZE, SIZE, SIZE, SIZE, POINTER, SIZE, POINTER, SIZE)  # x and its transform


def rotate_quantize(
    x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int, clip: torch.Tensor, num_bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference, bit by bit; matrices and clip float32 and contiguous."""
    x = x.contiguous()
    tokens, groups = len(x), len(clip)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    scale = torch.empty(tokens, groups)
    zero = torch.empty(tokens, groups, dtype=torch.int32)
    _rotate_quantize()(
        x.data_ptr(),
        DTYPES[x.dtype],
        tokens,
        x.shape[1],
        *transform_arguments(matrices, hadamard),
        clip.data_ptr(),
        groups,
        num_bits,
        symmetric,
        codes.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
    )
    return codes, scale, zero


def rotate_quantize_wide(
    x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`wide_codes` of the reference behind the transform, bit by bit."""
    x = x.contiguous()
    rows = 2 * len(x)
    codes = torch.empty(rows, x.shape[1], dtype=torch.uint8)
    scale, zero = torch.empty(rows, 1), torch.empty(rows, 1, dtype=torch.int32)
    transform = transform_arguments(matrices, hadamard)
    outputs = (codes.data_ptr(), scale.data_ptr(), zero.data_ptr())
    _rotate_quantize_wide()(x.data_ptr(), DTYPES[x.dtype], *x.shape, *transform, *outputs)
    return codes, scale, zero


def rotate(x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int) -> torch.Tensor:
    """x [tokens, K] in any of the three dtypes through the input transform, in float32."""
    x = x.contiguous()
    y = torch.empty(x.shape)
    arguments = (x.data_ptr(), DTYPES[x.dtype], *x.shape, *transform_arguments(matrices, hadamard), y.data_ptr())
    _rotate()(*arguments)
    return y


def transform_arguments(matrices: list[torch.Tensor], hadamard: int) -> tuple[int, int, int, int, int]:
    """Kind, left matrix and size, right matrix and size, as the library takes them."""
    if hadamard:
        dense = _dense(hadamard)
        return HADAMARD, dense.data_ptr(), len(dense), 0, hadamard
    if not matrices:
        return NONE, 0, 0, 0, 0
    if len(matrices) == 1:
        return BLOCKS, 0, 0, matrices[0].data_ptr(), matrices[0].shape[1]
    left, right = matrices
    return KRONECKER, left.data_ptr(), len(left), right.data_ptr(), len(right)


@cache
def _dense(size: int) -> torch.Tensor:
    return hadamard_dense(size).float().contiguous()


@cache
def _rotate_quantize() -> Callable[..., None]:
    return function("infoquant_rotate_quantize", *INPUT, POINTER, SIZE, SIZE, SIZE, POINTER, POINTER, POINTER)


@cache
def _rotate_quantize_wide() -> Callable[..., None]:
    return function("infoquant_rotate_quantize_wide", *INPUT, POINTER, POINTER, POINTER)


@cache
def _rotate() -> Callable[..., None]:
    return function("infoquant_rotate", *INPUT, POINTER)
