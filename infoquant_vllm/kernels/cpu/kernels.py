"""The compiled library's operations, and the layouts they read; kernels/torch defines what each computes."""

import math
from functools import cache

import torch
import torch.nn.functional as F

from infoquant_vllm.format import apply_hadamard, hadamard_dense
from infoquant_vllm.kernels.cpu.library import operations
from infoquant_vllm.kernels.operands import InputQuant, KVCalibration, KVScheme, PackedWeight, ScoreParams, Sequences

PANEL = 32  # channels
STEP = 4  # features
FEW_ROWS = 8  # for more rows torch's GEMM of 16-bit floats is faster


def prepare_linear(weight: PackedWeight, num_bits: int, segments: int) -> PackedWeight:
    """Convert a checkpoint's weight to what `linear` reads.

    Codes become lines [N / 32, K / 4, 16 * num_bits] uint8, multipliers and zero-points [N / 32, groups, 32].
    """
    packed, scale, *qparams = weight
    lines = _lines(packed, num_bits, weight.zero_point is None)
    return PackedWeight(lines, scale, *(None if each is None else _panels(each) for each in qparams))


def _lines(packed: torch.Tensor, num_bits: int, signed: bool) -> torch.Tensor:
    """Lay out a checkpoint's bytes [N, K * num_bits / 8] in lines of four features of 32 channels.

    Codes are unsigned (signed ones plus 2^(bits-1)): byte 4c + j is feature j of channel c, with that of channel 16 + c
    in the high nibble or, at 8 bits, 64 bytes further. Zeros pad N to a multiple of 32 and K to a multiple of 4.
    """
    codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten(1) if num_bits == 4 else packed
    codes = codes ^ 2 ** (num_bits - 1) if signed else codes
    padded = F.pad(codes, (0, -codes.shape[1] % STEP, 0, -len(codes) % PANEL))
    lines = padded.view(len(padded) // PANEL, 2, PANEL // 2, -1, STEP).permute(0, 3, 1, 2, 4)
    return (lines[:, :, 0] | lines[:, :, 1] << 4 if num_bits == 4 else lines).flatten(2).contiguous()


def _panels(qparams: torch.Tensor) -> torch.Tensor:
    """Lay out multipliers or zero-points [N, groups] as [N / 32, groups, 32], in the order that lines are read."""
    padded = F.pad(qparams, (0, 0, 0, -len(qparams) % PANEL))
    return padded.view(-1, PANEL, qparams.shape[1]).transpose(1, 2).contiguous()


def prepare_matrices(matrices: list[torch.Tensor], hadamard: int) -> list[torch.Tensor]:
    """Return the matrices of an input transform; those of a Hadamard are its base matrix."""
    return [_base_hadamard(hadamard)] if hadamard else matrices


@cache
def _base_hadamard(size: int) -> torch.Tensor:
    return hadamard_dense(size).float().contiguous()


def weight_rows(weight: torch.Tensor, rows: torch.Tensor, features: int) -> torch.Tensor:
    """Return signed codes [..., features] int8 of rows of an 8-bit weight from `prepare_linear`."""
    lines = weight.view(len(weight), -1, 2, PANEL // 2, STEP)
    panel, channel = rows // PANEL, rows % PANEL
    found = lines[panel, :, channel // (PANEL // 2), channel % (PANEL // 2)]
    return (found.flatten(-2)[..., :features] ^ 0x80).view(torch.int8)


def linear(x: torch.Tensor, inputs: InputQuant, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply as kernels/torch does, bit by bit; matrices and clip ratios contiguous."""
    return operations().linear(x, *inputs, *weight, bias)


def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply by an unquantized matrix; last bits may differ from kernels/torch."""
    if len(x) > FEW_ROWS or x.dtype == torch.float32 or not weight.is_contiguous():
        return F.linear(x, weight)
    return operations().few_rows_linear(x, weight)


def rotate_rows(rows: torch.Tensor, rotation: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
    """Rotate rows; rotation and gain float32. Each product and sum rounds, in the order of the features."""
    return operations().rotate_rows(rows, rotation, gain)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Normalize; the weight in the dtype of x, or float32."""
    return operations().rms_norm(x, weight, epsilon)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add and normalize; all in the dtype of x, but the weight may be float32."""
    return operations().add_rms_norm(x, residual, weight, epsilon)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Multiply silu(gate) by up."""
    return operations().silu_and_mul(x)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Multiply gelu_tanh(gate) by up."""
    return operations().gelu_tanh_and_mul(x)


def rotary_embedding(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, cos_sin: torch.Tensor, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply RoPE; any stride between tokens."""
    return operations().rotary_embedding(positions, query, key, cos_sin, head_size)


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    calibration: KVCalibration,
    scheme: KVScheme,
) -> None:
    """Store key, value [tokens, kv_heads, head_size] with any stride between tokens."""
    *clip_ratios, key_mean, feedback = calibration
    num_bits, hadamard = scheme
    if hadamard and not _has_butterflies(key.shape[2]):
        key = key[: len(slots)].float() if key_mean is None else key[: len(slots)].float() - key_mean
        key, key_mean, hadamard = apply_hadamard(key), None, False
    operations().kv_store(key, value, cache, slots, *clip_ratios, key_mean, feedback, hadamard, *num_bits)


def kv_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    sequences: Sequences,
    score: ScoreParams,
    scheme: KVScheme,
    out: torch.Tensor,
) -> None:
    """Attend with query [tokens, heads, head_size] with any stride between tokens."""
    num_bits, hadamard = scheme
    if hadamard and not _has_butterflies(query.shape[2]):
        query, hadamard = apply_hadamard(query.float()), False
    scale, soft_cap = (number * math.log2(math.e) for number in (score.scale, score.soft_cap or 0.0))
    operations().kv_attention(query, cache, *sequences, hadamard, scale, score.window or 0, soft_cap, *num_bits, out)


def _has_butterflies(size: int) -> bool:
    """Return whether the compiled kernels do the Hadamard of this size, or torch before they are called."""
    return size & (size - 1) == 0
