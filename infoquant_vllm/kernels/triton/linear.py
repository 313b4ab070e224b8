"""A linear layer on a GPU: the quantizer's kernel, then the GEMM's; semantics: kernels/torch/linear.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.triton import common
from infoquant_vllm.kernels.triton.gemm import gemm_kernel, split_k_reduce_kernel
from infoquant_vllm.kernels.triton.rotate_quantize import Codes, prepare_matrices, rotate_quantize
from infoquant_vllm.kernels.triton.tiles import BAND, REDUCE_TILE, Tile, linear_tile, token_class
from infoquant_vllm.kernels.triton.weights import (
    prepare_qparams,
    prepare_weight,
    stored_layout,
    sums_dtype,
    weight_rows,
)

__all__ = ["linear", "prepare_matrices", "prepare_qparams", "prepare_weight", "rotate_rows", "weight_rows"]


def linear(x: torch.Tensor, inputs: InputQuant, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute what the reference does, from tensors that the three `prepare_` functions return.

    Results are the same bits, but for float32 products with matrices of an input transform, which round elsewhere (a
    code in some hundred thousand differs by one), and for sums over groups of few tokens (see `gemm`).
    """
    matrices, hadamard, clip, num_bits, symmetric = inputs
    features = x.shape[1]
    groups = max(1 if clip is None else len(clip), weight.scale.shape[1])
    _, shape = stored_layout(weight.packed.numel(), len(weight.scale), features, groups)
    sum_groups = 0 if weight.zero_point is None else groups
    codes = rotate_quantize(x, matrices, hadamard, clip, num_bits, symmetric, shape.padded, sum_groups)
    return gemm(codes, features, weight, bias, x.dtype, int16=clip is None)


def gemm(
    codes: Codes,
    features: int,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
    int16: bool = False,
) -> torch.Tensor:
    """Multiply quantized rows with a weight: [tokens, N] in `dtype`.

    bias [N]. tile: None for the table's. int16: a token has a row of high and a row of low bytes, whose products are
    added in float32. The result is the reference's bits, but for last bits of sums over groups where the features of a
    few tokens are split over programs.
    """
    rows, channels = len(codes.values), len(weight.scale)
    sizes = channels, features, len(codes.scale), weight.scale.shape[1]
    arch = common.architecture(weight.packed.device)
    made = plan(arch, token_class(rows), weight.packed.numel(), sizes, codes.zp_offset is not None, int16, tile)
    out = torch.empty(rows // 2 if int16 else rows, channels, dtype=dtype, device=weight.packed.device)
    assert codes.values.shape[1] == made.codes_stride
    assert all(grid is None or grid.stride(0) == 1 for grid in weight[1:]), "not from prepare_qparams"
    if rows == 0:
        return out
    splits, partial = made.tile.splits, out
    if splits > 1:
        partial = torch.empty((splits, rows, channels), dtype=made.partial_dtype, device=out.device)
    gemm_kernel[made.programs * -(-rows // made.tile.block_m), splits](
        *codes, *weight, bias, partial, rows, *made.sizes, **made.constants
    )
    if splits > 1:
        block_m, block_n = REDUCE_TILE
        split_k_reduce_kernel[-(-channels // block_n), -(-rows // block_m)](
            partial, *codes[1:], *weight, bias, out, rows, channels, *made.sizes[-2:], **made.reduce_constants
        )
    return out


class Plan(NamedTuple):
    """Arguments of a GEMM's launches beside tensors, the same for all numbers of tokens of a class."""

    tile: Tile
    programs: int
    """for all channels"""
    codes_stride: int
    partial_dtype: torch.dtype
    """of sums of a split GEMM"""
    sizes: tuple[int, ...]
    """the kernel's arguments from N to `features`"""
    constants: dict[str, Any]
    reduce_constants: dict[str, Any]


@cache
def plan(
    arch: int,
    tokens: int,
    size: int,
    sizes: tuple[int, int, int, int],
    has_zp_offset: bool,
    int16: bool,
    tile: Tile | None,
) -> Plan:
    """Plan GEMMs of up to `tokens` rows, a class of them, with a weight of `size` bytes.

    sizes: channels, features, groups of the input, groups of the weight.
    """
    channels, features, input_groups, weight_groups = sizes
    groups = max(input_groups, weight_groups)
    bits, shape = stored_layout(size, channels, features, groups)
    tile = tile or linear_tile(arch, tokens, channels, shape)
    steps, stride = shape.steps(tile.block_k), shape.padded * bits // 8
    shared = {
        "WEIGHT_SPAN": groups // weight_groups if weight_groups > 1 else 0,
        "WEIGHT_BITS": bits,
        "SUM_BITS": sums_dtype(shape, bits).itemsize * 8 if has_zp_offset else 0,
        "INT16": int16,
        "enable_fp_fusion": False,
    }
    constants = {
        "GROUP_SIZE": shape.group_size,
        "INPUT_SPAN": groups // input_groups if input_groups > 1 else 0,
        "SPLIT_K": tile.splits > 1,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "RUN": shape.run,
        "BAND": BAND,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    reduce_constants = {
        "GROUPED": shape.group_size > 0,
        "SPLITS": tile.splits,
        "BLOCK_M": REDUCE_TILE[0],
        "BLOCK_N": REDUCE_TILE[1],
        "num_warps": 4,
    }
    return Plan(
        tile,
        triton.cdiv(channels, tile.block_n),
        shape.padded,
        torch.float32 if shape.group_size else torch.int32,
        (channels, groups, steps, triton.cdiv(steps, tile.splits), shape.padded, stride, features),
        shared | constants,
        shared | reduce_constants,
    )


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """Rotate rows into or out of the rotated residual basis; last bits of float32 depend on torch's product."""
    with _full_precision():
        out = rows.float() @ rotation
    return (out if gain is None else out.mul_(gain)).to(rows.dtype)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 as float32, where VLLM_FLOAT32_MATMUL_PRECISION allows the 11 bits of TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
