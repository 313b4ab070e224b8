"""A linear layer on a GPU: the quantizer's kernel, then the GEMM's; semantics: kernels/torch/linear.py."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.triton import common
from infoquant_vllm.kernels.triton.gemm import gemm_kernel, split_k_reduce_kernel
from infoquant_vllm.kernels.triton.rotate_quantize import Codes, prepare_matrices, rotate_quantize
from infoquant_vllm.kernels.triton.tiles import BAND, REDUCE_TILE, Tile, linear_tile, token_class
from infoquant_vllm.kernels.triton.weights import prepare_linear, stored_layout, weight_rows

__all__ = ["linear", "prepare_linear", "prepare_matrices", "rotate_rows", "weight_rows"]


def linear(x: torch.Tensor, inputs: InputQuant, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute what the reference does, from tensors that the `prepare_` functions return.

    Results are the same bits, but for float32 products with matrices of an input transform, which round elsewhere: a
    code in some hundred thousand differs by one.
    """
    channels, features = len(weight.scale), x.shape[1]
    runs = 0 if weight.multiplier is None else len(weight.multiplier)
    _, shape = stored_layout(weight.packed.numel(), channels, features, inputs.segments, runs)
    codes = rotate_quantize(x, inputs, shape.padded, with_sums=weight.zero_point is not None)
    return gemm(codes, features, weight, bias, x.dtype, int16=inputs.clip_ratio is None)


def gemm(
    codes: Codes,
    features: int,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
    int16: bool = False,
) -> torch.Tensor:
    """Multiply quantized rows with a weight: [tokens, N] in `dtype`, the reference's bits.

    bias [N]. tile: None for the table's. int16: a token has a row of high and a row of low bytes, whose products are
    added in float32.
    """
    rows, channels = len(codes.values), len(weight.scale)
    runs = 0 if weight.multiplier is None else len(weight.multiplier)
    sizes = weight.packed.numel(), channels, features, len(codes.scale), runs
    made = plan(common.architecture(weight.packed.device), token_class(rows), sizes, int16, tile)
    out = torch.empty(rows // 2 if int16 else rows, channels, dtype=dtype, device=weight.packed.device)
    assert codes.values.shape[1] == made.values_stride
    if rows == 0:
        return out
    partial = out
    if made.splits > 1:
        partial = torch.empty((made.splits, rows, channels), dtype=torch.int32, device=out.device)
    gemm_kernel[made.programs * -(-rows // made.tile.block_m), made.splits](
        *codes, *weight, bias, partial, rows, *made.sizes, SPLITS=made.tile.splits, **made.constants
    )
    if made.splits > 1:
        block_m, block_n = REDUCE_TILE
        split_k_reduce_kernel[-(-channels // block_n), -(-rows // block_m)](
            partial,
            *codes[1:],
            *weight,
            bias,
            out,
            rows,
            channels,
            *made.sizes[-2:],
            SPLITS=made.tile.splits,
            **made.reduce_constants,
        )
    return out


class Plan(NamedTuple):
    """Arguments of a GEMM's launches beside tensors, the same for all numbers of tokens of a class."""

    tile: Tile
    programs: int
    """for all channels"""
    splits: int
    """of all features"""
    values_stride: int
    sizes: tuple[int, ...]
    """the kernel's arguments from N to `features`"""
    constants: dict[str, Any]
    reduce_constants: dict[str, Any]


@cache
def plan(arch: int, tokens: int, sizes: tuple[int, int, int, int, int], int16: bool, tile: Tile | None) -> Plan:
    """Plan GEMMs of up to `tokens` rows, a class of them.

    sizes: bytes of the weight, channels, features, segments, runs of the multipliers (0: there are none).
    """
    size, channels, features, segments, runs = sizes
    bits, shape = stored_layout(size, channels, features, segments, runs)
    tile = tile or linear_tile(arch, tokens, channels, shape)
    steps = shape.steps(tile.block_k)
    shared = {"SEGMENTS": segments, "WEIGHT_BITS": bits, "INT16": int16, "enable_fp_fusion": False}
    constants = {
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "RUN": shape.run,
        "BAND": BAND,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    reduce_constants = {"BLOCK_M": REDUCE_TILE[0], "BLOCK_N": REDUCE_TILE[1], "num_warps": 4}
    strides = shape.stride, shape.stride * bits // 8
    return Plan(
        tile,
        triton.cdiv(channels, tile.block_n),
        segments * tile.splits if tile.splits > 1 else 1,
        shape.stride,
        (channels, steps, triton.cdiv(steps, tile.splits), *strides, shape.features),
        shared | constants,
        shared | reduce_constants,
    )


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """Rotate rows into or out of the rotated residual basis; last bits of float32 depend on torch's product."""
    with common.full_precision():
        out = rows.float() @ rotation
    return (out if gain is None else out.mul_(gain)).to(rows.dtype)
