"""Input transform and quantization of activations on a GPU; semantics: kernels/torch/quantize.py."""

from math import frexp, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton

from infoquant_vllm.format import hadamard as hadamard_matrix
from infoquant_vllm.format import hadamard_dense
from infoquant_vllm.kernels.operands import InputQuant
from infoquant_vllm.kernels.triton import common
from infoquant_vllm.kernels.triton.quantize import DEPTH, rotate_quantize_kernel
from infoquant_vllm.kernels.triton.tiles import FEW_TOKENS

PER_WARP, PER_WARP_OF_PAIRS = 2048, 1024  # features that a warp holds, and those it holds with a right matrix
MAX_FEATURES = 16384  # of a row that a program transforms; wider rows go through torch.matmul
MAX_ORDER = 128  # of a matrix that a program multiplies with
WIDTH = 4096  # features of all its tokens that a program holds where it can choose


class Codes(NamedTuple):
    """Quantized rows: value[t, k] = (values[t, k] - zp_offset[s, t]) * scale[s, t] in each segment s of the features.

    At 4 bits that is all there is to subtract, so that the GEMM has nothing to correct; 8-bit codes are stored less
    128, and what is left of the zero-point is in zp_offset.
    """

    values: torch.Tensor
    """int8 [tokens, padded features]; the padding is arbitrary, as it meets weights of zero"""
    scale: torch.Tensor
    """float32 [segments, tokens]"""
    zp_offset: torch.Tensor | None
    """int32 [segments, tokens]; None: zeros"""
    sums: torch.Tensor | None
    """int32 [segments, tokens]: sums of `values`, for weights with a zero-point"""

    @classmethod
    def empty(cls, tokens: int, inputs: InputQuant, padded: int, with_sums: bool, device: torch.device) -> "Codes":
        """Allocate codes, segments of `padded` features; at 16 bits a token has a row of high and one of low bytes."""
        num_bits, segments = inputs.num_bits, inputs.segments
        rows = 2 * tokens if num_bits == 16 else tokens
        has_zp_offset = num_bits == 16 or (num_bits == 8 and not inputs.symmetric)
        return cls(
            torch.empty(rows, segments * padded, dtype=torch.int8, device=device),
            torch.empty(segments, rows, dtype=torch.float32, device=device),
            torch.empty(segments, rows, dtype=torch.int32, device=device) if has_zp_offset else None,
            torch.empty(segments, rows, dtype=torch.int32, device=device) if with_sums else None,
        )


def prepare_matrices(matrices: list[torch.Tensor], hadamard: int) -> list[torch.Tensor]:
    """Return the matrices of an input transform, contiguous; for a Hadamard its base matrix, if larger than 1.

    A Hadamard with a base matrix that is too wide for a program becomes a Kronecker pair.
    """
    if not hadamard:
        return [matrix.contiguous() for matrix in matrices]
    base = hadamard_dense(hadamard)
    order, device = len(base), common.current_device()
    if order == 1:
        return []
    factors = [base]
    if order > MAX_ORDER or hadamard > MAX_FEATURES:
        factors = [base / sqrt(order), hadamard_matrix(hadamard // order)]
    return [factor.to(device, torch.float32).contiguous() for factor in factors]


class Segment(NamedTuple):
    """What a program quantizes of a token: `blocks` blocks of outer * inner features."""

    blocks: int
    outer: int
    inner: int

    @property
    def features(self) -> int:
        """Features of a token."""
        return self.blocks * self.outer * self.inner

    @property
    def padded(self) -> tuple[int, int, int]:
        """Each size, rounded up to a power of two."""
        return tuple(map(triton.next_power_of_2, self))

    def padded_group(self, size: int) -> int:
        """Return the elements that a group of `size` features takes; raises ValueError if padding would split it.

        Behind each block there may be padding, so that a group is all, a block or some, or within one.
        """
        blocks, outer, inner = self.padded
        if size == self.features:
            return blocks * outer * inner
        block = self.outer * self.inner
        gaps = inner != self.inner and self.blocks * self.outer > 1
        across = outer != self.outer and self.blocks > 1 and block % size
        if size % block == 0:
            found, parts = size // block * outer * inner, size // block
        else:
            found, parts = size, 0 if gaps or across else size
        if parts == 0 or found & (found - 1):
            raise ValueError(
                f"groups of {size} features: beside {self} the Triton kernels need a power of two, whole in a block"
            )
        return found


def segment(features: int, factors: tuple[int, int], group_size: int) -> Segment:
    """Cut a segment into blocks; factors: (outer, inner) sizes of the transform's block, product 1 for none."""
    size = factors[0] * factors[1]
    if size == 1:
        inner = features if group_size & (group_size - 1) == 0 else group_size
        return Segment(features // inner, 1, inner)
    if features % size:
        raise ValueError(f"segments of {features} features and a transform of {size} do not nest")
    return Segment(features // size, *factors)


def rotate_quantize(
    x: torch.Tensor, inputs: InputQuant, padded: int, with_sums: bool, experts: torch.Tensor | None = None
) -> Codes:
    """Transform and quantize x [tokens, K], rows any stride apart, as the reference does.

    inputs.matrices: from `prepare_matrices`. padded: features of a stored segment, those behind its own are not
    written; with_sums: for weights with a zero-point. experts int32, one for each row, as in `ExpertChoice`: x is
    [tokens, 2 K], gate before up of each token's expert, silu(gate) * up is quantized by that expert's clip ratios,
    and nothing for experts below 0.
    """
    tokens, features = len(x), x.shape[1] if experts is None else x.shape[1] // 2
    codes = Codes.empty(tokens, inputs, padded, with_sums, x.device)
    if tokens == 0:
        return codes
    matrices = inputs.matrices
    in_blocks = len(matrices) == 1 and not inputs.hadamard
    wide = features > MAX_FEATURES or max(map(len, matrices), default=0) > MAX_ORDER
    if in_blocks or (wide and len(matrices) == 2):
        x = x if experts is None else _silu_and_mul(x)
        x, inputs = _multiplied(x.float(), matrices), inputs._replace(matrices=[], hadamard=0)
    _launch(x if x.stride(1) == 1 else x.contiguous(), inputs, codes, features, experts)
    return codes


def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up of x [tokens, 2 K], as the kernel does."""
    gate, up = x.chunk(2, 1)
    return F.silu(gate.float()).to(x.dtype) * up


def _multiplied(x: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    """Multiply x [tokens, K] float32 by matrices that are too wide for a program, or in blocks of features."""
    with common.full_precision():
        if len(matrices) == 1:
            blocks = x.unflatten(1, (len(matrices[0]), -1)).transpose(0, 1)
            return torch.matmul(blocks, matrices[0]).transpose(0, 1).flatten(1)
        left, right = matrices
        pairs = x.unflatten(1, (-1, len(left), len(right)))
        return torch.matmul(torch.matmul(left.t(), pairs), right).flatten(1)


def _launch(x: torch.Tensor, inputs: InputQuant, codes: Codes, features: int, experts: torch.Tensor | None) -> None:
    """Fill `codes` from x [tokens, features], or twice the features, if they are gate and up."""
    tokens, segments, hadamard = len(x), inputs.segments, inputs.hadamard
    groups = 1 if inputs.clip_ratio is None else inputs.clip_ratio.shape[-2]
    left, right = (*inputs.matrices, None, None)[:2]
    outer = len(left) if left is not None else 1
    inner = hadamard // outer if hadamard else len(right) if right is not None else 1
    factor = 1 / sqrt(hadamard) if hadamard else 1.0
    part = segment(features // segments, (outer, inner), features // groups)
    blocks, outer_padded, inner_padded = part.padded
    width = blocks * max(outer_padded, DEPTH.value if left is not None else 1)
    width *= max(inner_padded, DEPTH.value if right is not None else 1)
    rows = max(1, WIDTH // width) if tokens > FEW_TOKENS else 1
    held = rows * width if right is None else max(rows * width, outer_padded**2, inner_padded**2)
    rotate_quantize_kernel[triton.cdiv(tokens, rows), segments](
        x,
        left,
        right,
        inputs.clip_ratio,
        inputs.mean,
        experts,
        *codes,
        tokens,
        x.stride(0),
        codes.values.shape[1],
        HADAMARD=hadamard > 0,
        SIGNS=hadamard > 0 and outer % 4 == 0,
        FACTOR=factor,
        EXACT_FACTOR=frexp(factor)[0] == 0.5,
        BLOCKS=part.blocks,
        OUTER=part.outer,
        INNER=part.inner,
        BLOCKS_PADDED=blocks,
        OUTER_PADDED=outer_padded,
        INNER_PADDED=inner_padded,
        GROUPS=groups // segments,
        GROUP_PADDED=part.padded_group(features // groups),
        SEGMENT_PADDED=codes.values.shape[1] // segments,
        GATED=x.shape[1] != features,
        NUM_BITS=inputs.num_bits,
        SYMMETRIC=inputs.symmetric or inputs.num_bits == 16,
        ROWS=rows,
        enable_fp_fusion=False,
        num_warps=max(1, min(16, held // (PER_WARP if right is None else PER_WARP_OF_PAIRS))),
    )
