"""Input transform and quantization of activations on a GPU; semantics: kernels/torch/quantize.py."""

from math import frexp, gcd, sqrt
from typing import NamedTuple

import torch
import triton

from infoquant_vllm.format import hadamard as hadamard_matrix
from infoquant_vllm.format import hadamard_dense
from infoquant_vllm.kernels.triton.common import current_device
from infoquant_vllm.kernels.triton.quantize import DEPTH, rotate_blocks_kernel, rotate_quantize_kernel
from infoquant_vllm.kernels.triton.tiles import FEW_TOKENS

PER_WARP, PER_WARP_OF_PAIRS = 2048, 1024  # features that a warp holds, and those it holds with a right matrix
MAX_FEATURES = 16384  # of a row that a program transforms; wider rows go through torch.matmul
MAX_ORDER = 128  # of a matrix that a program multiplies with
WIDTH = 4096  # features of all its tokens that a program holds where it can choose


class Codes(NamedTuple):
    """Quantized rows: value[t, k] = (values[t, k] - zp_offset[g, t]) * scale[g, t].

    4-bit codes are stored less their zero point, which fits in an int8, so that the GEMM has nothing to correct; 8-bit
    ones are stored less 128, and what is left of the zero point is in zp_offset.
    """

    values: torch.Tensor
    """int8 [tokens, padded features]; the padding is arbitrary, as it meets weights of zero"""
    scale: torch.Tensor
    """float32 [groups, tokens]"""
    zp_offset: torch.Tensor | None
    """int32 [groups, tokens]; None: zeros"""
    sums: torch.Tensor | None
    """int32 [finer groups, tokens]: sums of `values`, for weights with zero points"""

    @classmethod
    def empty(
        cls,
        tokens: int,
        groups: int,
        padded: int,
        sum_groups: int,
        num_bits: int,
        symmetric: bool,
        device: torch.device,
    ) -> "Codes":
        """Allocate codes of `num_bits`, at 16 bits a row of high and a row of low bytes for each token."""
        rows = 2 * tokens if num_bits == 16 else tokens
        has_zp_offset = num_bits == 16 or (num_bits == 8 and not symmetric)
        return cls(
            torch.empty(rows, padded, dtype=torch.int8, device=device),
            torch.empty(groups, rows, dtype=torch.float32, device=device),
            torch.empty(groups, rows, dtype=torch.int32, device=device) if has_zp_offset else None,
            torch.empty(sum_groups, rows, dtype=torch.int32, device=device) if sum_groups else None,
        )


def prepare_matrices(matrices: list[torch.Tensor], hadamard: int) -> list[torch.Tensor]:
    """Return the matrices of an input transform, contiguous; for a Hadamard its base matrix, if larger than 1.

    A Hadamard with a base matrix that is too wide for a program becomes a Kronecker pair.
    """
    if not hadamard:
        return [matrix.contiguous() for matrix in matrices]
    base = hadamard_dense(hadamard)
    order, device = len(base), current_device()
    if order == 1:
        return []
    factors = [base]
    if order > MAX_ORDER or hadamard > MAX_FEATURES:
        factors = [base / sqrt(order), hadamard_matrix(hadamard // order)]
    return [factor.to(device, torch.float32).contiguous() for factor in factors]


class Segment(NamedTuple):
    """The part of a token that a program quantizes: `blocks` blocks of outer * inner features."""

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

        Behind each block there may be padding, so that groups must not lie across two.
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
    """Cut a token into segments; factors: (outer, inner) sizes of the transform's block, product 1 for none."""
    size = factors[0] * factors[1]
    if size == 1:
        groups = WIDTH // group_size if group_size & (group_size - 1) == 0 else 1
        while features // group_size % max(groups, 1):
            groups //= 2
        return Segment(1, 1, group_size * max(groups, 1))
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
    """Transform and quantize x [tokens, K], rows any stride apart; arguments are the reference's.

    clip None: 16 bits, one group. matrices: from `prepare_matrices`. padded: features of a stored row, those behind K
    are not written; sum_groups: groups whose codes are summed, 0 for none.
    """
    tokens, features = x.shape
    groups = 1 if clip is None else len(clip)
    codes = Codes.empty(tokens, groups, padded, sum_groups, num_bits, symmetric, x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    if tokens == 0:
        return codes
    quantizer = {
        "GROUP_SIZE": features // groups,
        "SUM_SIZE": features // (sum_groups or groups),
        "NUM_BITS": num_bits,
        "SYMMETRIC": symmetric or num_bits == 16,
        "enable_fp_fusion": False,
    }
    if matrices and matrices[0].dim() == 3:
        _launch_blocks(x, matrices[0], clip, codes, quantizer)
        return codes
    left, right = (*matrices, None, None)[:2]
    if left is not None and right is not None and (features > MAX_FEATURES or max(map(len, matrices)) > MAX_ORDER):
        pairs = x.float().reshape(tokens, -1, len(left), len(right))
        x = torch.matmul(torch.matmul(left.t(), pairs), right).view(tokens, features)
        left, right, hadamard = None, None, 0
    _launch_rows(x, (left, right), hadamard, clip, codes, quantizer)
    return codes


def _launch_rows(
    x: torch.Tensor,
    matrices: tuple[torch.Tensor | None, torch.Tensor | None],
    hadamard: int,
    clip: torch.Tensor | None,
    codes: Codes,
    quantizer: dict[str, int],
) -> None:
    """Fill `codes` from x [tokens, K]; quantizer: the kernel's constants of it."""
    (tokens, features), (left, right) = x.shape, matrices
    outer = len(left) if left is not None else 1
    inner = hadamard // outer if hadamard else len(right) if right is not None else 1
    factor = 1 / sqrt(hadamard) if hadamard else 1.0
    part = segment(features, (outer, inner), quantizer["GROUP_SIZE"])
    blocks, outer_padded, inner_padded = part.padded
    width = blocks * max(outer_padded, DEPTH.value if left is not None else 1)
    width *= max(inner_padded, DEPTH.value if right is not None else 1)
    rows = max(1, WIDTH // width) if tokens > FEW_TOKENS else 1
    held = rows * width if right is None else max(rows * width, outer_padded**2, inner_padded**2)
    rotate_quantize_kernel[triton.cdiv(tokens, rows), features // part.features](
        x,
        left,
        right,
        clip,
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
        GROUP_PADDED=part.padded_group(quantizer["GROUP_SIZE"]),
        SUM_PADDED=part.padded_group(quantizer["SUM_SIZE"]),
        ROWS=rows,
        **quantizer,
        num_warps=max(1, min(16, held // (PER_WARP if right is None else PER_WARP_OF_PAIRS))),
    )


def _launch_blocks(
    x: torch.Tensor, blocks: torch.Tensor, clip: torch.Tensor | None, codes: Codes, quantizer: dict[str, int]
) -> None:
    """Fill `codes` from x [tokens, K] and blocks [K / size, size, size]; quantizer: the kernel's constants of it."""
    tokens, features = x.shape
    size, group_size = blocks.shape[1], quantizer["GROUP_SIZE"]
    columns = gcd(size, group_size, quantizer["SUM_SIZE"], 64)
    if columns < 16 or max(size, group_size) % min(size, group_size):
        raise ValueError(
            f"blocks of {size} and groups of {group_size} features: the Triton kernels need multiples of 16 that nest"
        )
    rows = 64 if tokens > FEW_TOKENS else 16
    rotate_blocks_kernel[triton.cdiv(tokens, rows), features // group_size](
        x,
        blocks,
        clip,
        *codes,
        tokens,
        x.stride(0),
        codes.values.shape[1],
        BLOCK_SIZE=size,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK_K=gcd(size, 32),
        **quantizer,
        num_warps=4,
    )
