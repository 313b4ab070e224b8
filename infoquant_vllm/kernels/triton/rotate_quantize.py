"""Input transform and activation quantizer in one pass: rows are read once, and codes written once."""

from math import frexp, sqrt
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from infoquant_vllm.format import hadamard as hadamard_matrix
from infoquant_vllm.format import hadamard_dense
from infoquant_vllm.kernels.triton.codes import Codes
from infoquant_vllm.kernels.triton.configurations import FEW_TOKENS, current_device
from infoquant_vllm.kernels.triton.extremes import amax, amin
from infoquant_vllm.kernels.triton.hadamard import butterflies
from infoquant_vllm.kernels.triton.quantize import grid, store_rows, stored_codes
from infoquant_vllm.kernels.triton.rotate_blocks import rotate_blocks

PER_WARP, PER_WARP_OF_PAIRS = 2048, 1024  # features that a warp holds, and where they meet a right matrix
MAX_FEATURES = 16384  # of a row that a program transforms; pairs of matrices for wider rows are torch's work
MAX_ORDER = 128  # of a matrix that a program multiplies with
DEPTH = 16  # features that a product on tensor cores sums at the least
WIDTH = 4096  # features, those of all its tokens, that a program holds if it can choose

_DEPTH = tl.constexpr(DEPTH)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["M"])
def rotate_quantize_kernel(
    x_ptr,
    left_ptr,
    right_ptr,
    clip_ptr,
    values_ptr,
    scale_ptr,
    rest_ptr,
    sums_ptr,
    M,
    x_stride,
    values_stride,
    HADAMARD: tl.constexpr,
    SIGNS: tl.constexpr,
    FACTOR: tl.constexpr,
    EXACT_FACTOR: tl.constexpr,
    BLOCKS: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    OUTER_PADDED: tl.constexpr,
    INNER_PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SUM_SIZE: tl.constexpr,
    SUM_PADDED: tl.constexpr,
    NUM_BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Segments of BLOCKS * OUTER * INNER features of ROWS tokens: transform, range per group, codes.

    x [M, x_stride]; a segment's block X [OUTER, INNER] becomes left^T X right: butterflies in place of right for a
    Hadamard (times FACTOR in the end), left_ptr [OUTER, OUTER] its dense factor or a Kronecker pair's first, None
    for none. The dense factor goes first, when x still has 16 bits: its entries are +-1 (SIGNS) or the Hartley
    matrix's. Other products are float32 in three TF32 steps. clip [groups, 2]; values [rows, values_stride]
    int8, scale, rest [groups, rows], sums [finer groups, rows] as in `Codes`. A token has one row, at 16 bits
    two: of high and of low bytes.
    """
    SEGMENT: tl.constexpr = BLOCKS * OUTER * INNER
    LINES: tl.constexpr = ROWS * BLOCKS_PADDED * OUTER_PADDED
    line, inner = tl.arange(0, LINES), tl.arange(0, INNER_PADDED)
    outer, block = line % OUTER_PADDED, line // OUTER_PADDED % BLOCKS_PADDED
    token = (tl.program_id(0) * ROWS + line // (OUTER_PADDED * BLOCKS_PADDED)).to(tl.int64)
    feature = tl.program_id(1) * SEGMENT + ((block * OUTER + outer) * INNER)[:, None] + inner[None, :]
    mask = ((token < M) & (outer < OUTER) & (block < BLOCKS))[:, None] & (inner < INNER)[None, :]
    y = tl.load(x_ptr + token[:, None] * x_stride + feature, mask, other=0)
    if left_ptr is not None:
        y = _from_left(left_ptr, y, SIGNS, ROWS * BLOCKS_PADDED, OUTER, OUTER_PADDED, INNER_PADDED)
    y = y.to(tl.float32)
    if HADAMARD:
        y = butterflies(y, LINES, INNER_PADDED)
    if right_ptr is not None:
        right = _deepened(_matrix(right_ptr, INNER, INNER_PADDED))
        y = tl.dot(tl.trans(_deepened(tl.trans(y))), right, input_precision="tf32x3")

    COUNT: tl.constexpr = LINES * INNER_PADDED // ROWS // GROUP_PADDED
    y = tl.reshape(y, (ROWS, COUNT, GROUP_PADDED))
    low, high = amin(y, 2) * FACTOR, amax(y, 2) * FACTOR  # as if y had been multiplied: that keeps the order
    m, group, known = _groups(M, ROWS, COUNT, SEGMENT // GROUP_SIZE, BLOCKS, BLOCKS_PADDED)
    scale, inverse, zero = grid(low, high, clip_ptr, group, known, NUM_BITS, SYMMETRIC)
    if EXACT_FACTOR:
        inverse *= FACTOR
    else:
        y *= FACTOR
    codes = stored_codes(y, inverse[:, :, None], zero[:, :, None], NUM_BITS)
    codes = tl.reshape(codes, (LINES, INNER_PADDED))
    store_rows(scale_ptr, rest_ptr, scale, zero, group, m, known, M, NUM_BITS)
    values, blocks = values_ptr + feature, (BLOCKS, BLOCKS_PADDED)
    if NUM_BITS == 16:
        high_byte, codes = codes >> 8, (codes & 255) - 128
        tl.store(values + 2 * token[:, None] * values_stride, high_byte.to(tl.int8), mask)
        tl.store(values + (2 * token[:, None] + 1) * values_stride, codes.to(tl.int8), mask)
        if sums_ptr is not None:
            _store_sums(sums_ptr, high_byte, mask, M, 2, 0, ROWS, SEGMENT, SUM_SIZE, SUM_PADDED, *blocks)
            _store_sums(sums_ptr, codes, mask, M, 2, 1, ROWS, SEGMENT, SUM_SIZE, SUM_PADDED, *blocks)
    else:
        tl.store(values + token[:, None] * values_stride, codes.to(tl.int8), mask)
        if sums_ptr is not None:
            _store_sums(sums_ptr, codes, mask, M, 1, 0, ROWS, SEGMENT, SUM_SIZE, SUM_PADDED, *blocks)


@triton.jit
def _groups(
    M,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
):
    """(token [ROWS, 1], group [1, COUNT], which of them there are [ROWS, COUNT]) of this program."""
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    index = tl.arange(0, COUNT)[None, :]
    known = index < GROUPS
    if BLOCKS > 1 and GROUPS % BLOCKS == 0:  # padding lies behind each block
        place = index % (COUNT // BLOCKS_PADDED)
        index = index // (COUNT // BLOCKS_PADDED) * (GROUPS // BLOCKS) + place
        known = (place < GROUPS // BLOCKS) & (index < GROUPS)
    return m, tl.program_id(1) * GROUPS + index, (m < M) & known


@triton.jit
def _store_sums(
    sums_ptr,
    codes,
    mask,
    M,
    ROWS_PER_TOKEN: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SUM_SIZE: tl.constexpr,
    SUM_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
):
    COUNT: tl.constexpr = codes.numel // ROWS // SUM_PADDED
    m, group, known = _groups(M, ROWS, COUNT, SEGMENT // SUM_SIZE, BLOCKS, BLOCKS_PADDED)
    sums = tl.sum(tl.reshape(tl.where(mask, codes, 0), (ROWS, COUNT, SUM_PADDED)), 2)
    tl.store(sums_ptr + (group * M + m) * ROWS_PER_TOKEN + ROW, sums, known)


@triton.jit
def _from_left(
    left_ptr,
    x,
    SIGNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    OUTER: tl.constexpr,
    OUTER_PADDED: tl.constexpr,
    INNER_PADDED: tl.constexpr,
):
    """left^T X of each block X of x [BLOCKS * OUTER_PADDED, INNER_PADDED], by one product of them side by side.

    SIGNS: left's entries are +-1, so that x can stay in its 16 bits (not under the interpreter, whose dot cannot).
    """
    left = tl.trans(_deepened(_matrix(left_ptr, OUTER, OUTER_PADDED)))
    if SIGNS and not _INTERPRETED:
        left = left.to(x.dtype)
    else:
        x = x.to(tl.float32)
    blocks = tl.permute(tl.reshape(x, (BLOCKS, OUTER_PADDED, INNER_PADDED)), (1, 0, 2))
    blocks = _deepened(tl.reshape(blocks, (OUTER_PADDED, BLOCKS * INNER_PADDED)))
    product = tl.dot(left, blocks, input_precision="tf32x3")
    blocks = tl.permute(tl.reshape(product, (OUTER_PADDED, BLOCKS, INNER_PADDED)), (1, 0, 2))
    return tl.reshape(blocks, (BLOCKS * OUTER_PADDED, INNER_PADDED))


@triton.jit
def _matrix(ptr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """[SIZE, SIZE] float32, zeros behind it."""
    index = tl.arange(0, PADDED)
    known = index < SIZE
    return tl.load(ptr + index[:, None] * SIZE + index[None, :], known[:, None] & known[None, :], other=0)


@triton.jit
def _deepened(x):
    """x [k, n] with rows of zeros behind it, for a product that sums over enough of them."""
    for _ in tl.static_range(4):
        if x.shape[0] < _DEPTH:
            x = tl.reshape(tl.permute(tl.join(x, tl.zeros_like(x)), (2, 0, 1)), (2 * x.shape[0], x.shape[1]))
    return x


def prepare_matrices(matrices: list[torch.Tensor], hadamard: int) -> list[torch.Tensor]:
    """The matrices of an input transform, contiguous; of a Hadamard its dense factor, where it has one.

    Where a Hadamard with one is too wide for a program it becomes a Kronecker pair.
    """
    if not hadamard:
        return [matrix.contiguous() for matrix in matrices]
    dense = hadamard_dense(hadamard)
    order, device = len(dense), current_device()
    if order == 1:
        return []
    factors = [dense]
    if order > MAX_ORDER or hadamard > MAX_FEATURES:
        factors = [dense / sqrt(order), hadamard_matrix(hadamard // order)]
    return [factor.to(device, torch.float32).contiguous() for factor in factors]


class Segment(NamedTuple):
    """What a program transforms and quantizes of a token: `blocks` blocks of outer * inner features."""

    blocks: int
    outer: int
    inner: int

    @property
    def features(self) -> int:
        """Of a token."""
        return self.blocks * self.outer * self.inner

    @property
    def padded(self) -> tuple[int, int, int]:
        """Each size to a power of two."""
        return tuple(map(triton.next_power_of_2, self))

    def padded_group(self, size: int) -> int:
        """Places that a group of `size` features takes; raises ValueError where they would have gaps.

        Behind each block there may be a gap, so that groups must not lie across two.
        """
        blocks, outer, inner = self.padded
        if size == self.features:
            return blocks * outer * inner
        gaps = inner != self.inner and self.blocks * self.outer > 1
        across = outer != self.outer and self.blocks > 1 and self.outer * self.inner % size
        if size & (size - 1) or gaps or across:
            raise ValueError(
                f"groups of {size} features: beside {self} the Triton kernels need a power of two, whole in a block"
            )
        return size


def segment(features: int, factors: tuple[int, int], group_size: int) -> Segment:
    """How a token is cut; factors: (outer, inner) sizes of the transform's block, product 1 for none."""
    size = factors[0] * factors[1]
    if size == 1:
        several = WIDTH // group_size if group_size & (group_size - 1) == 0 else 1
        while features // group_size % max(several, 1):
            several //= 2
        return Segment(1, 1, group_size * max(several, 1))
    if group_size % size == 0:
        return Segment(group_size // size, *factors)
    if size % group_size == 0:
        return Segment(1, *factors)
    raise ValueError(f"groups of {group_size} features and a transform of {size} do not nest")


def rotate_quantize(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    clip: torch.Tensor | None,
    num_bits: int,
    symmetric: bool,
    padded: int,
    sum_groups: int,
) -> Codes:
    """x [tokens, K], rows any stride apart, transformed and quantized; arguments as the reference's.

    clip None: 16 bits, one group. matrices: as `prepare_matrices` makes them. padded: features of a
    stored row, what is behind K stays as it is found; sum_groups: groups whose codes are summed, 0 for none.
    """
    tokens, features = x.shape
    groups = 1 if clip is None else len(clip)
    codes = Codes.empty(tokens, groups, padded, sum_groups, num_bits, symmetric, x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    if tokens == 0:
        return codes
    sum_size = features // (sum_groups or groups)
    common = {
        "GROUP_SIZE": features // groups,
        "SUM_SIZE": sum_size,
        "NUM_BITS": num_bits,
        "SYMMETRIC": symmetric or num_bits == 16,
    }
    if matrices and matrices[0].dim() == 3:
        rotate_blocks(x, matrices[0], clip, codes, common)
    else:
        _rotate_rows(x, matrices, hadamard, clip, codes, common)
    return codes


def _rotate_rows(
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    hadamard: int,
    clip: torch.Tensor | None,
    codes: Codes,
    common: dict[str, int],
) -> None:
    tokens, features = x.shape
    left, right = (*matrices, None, None)[:2]
    if left is not None and right is not None and (features > MAX_FEATURES or max(map(len, matrices)) > MAX_ORDER):
        pairs = x.float().reshape(tokens, -1, len(left), len(right))
        x = torch.matmul(torch.matmul(left.t(), pairs), right).view(tokens, features)
        left, right, hadamard = None, None, 0
    outer = len(left) if left is not None else 1
    inner = hadamard // outer if hadamard else len(right) if right is not None else 1
    factor = 1 / sqrt(hadamard) if hadamard else 1.0
    part = segment(features, (outer, inner), common["GROUP_SIZE"])
    blocks, outer_padded, inner_padded = part.padded
    width = blocks * max(outer_padded, DEPTH if left is not None else 1)
    width *= max(inner_padded, DEPTH if right is not None else 1)
    rows = max(1, WIDTH // width) if tokens > FEW_TOKENS else 1
    held = rows * width if right is None else max(rows * width, outer_padded**2, inner_padded**2)
    rotate_quantize_kernel[triton.cdiv(tokens, rows), features // part.features](
        x,
        left,
        right,
        clip,
        codes.values,
        *codes[1:],
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
        GROUP_PADDED=part.padded_group(common["GROUP_SIZE"]),
        SUM_PADDED=part.padded_group(common["SUM_SIZE"]),
        ROWS=rows,
        **common,
        num_warps=max(1, min(16, held // (PER_WARP if right is None else PER_WARP_OF_PAIRS))),
        enable_fp_fusion=False,
    )
