"""Define the Hadamard transform of the format for any size: the matrix, and the order of its operations."""

import math
from functools import cache

import torch

from infoquant_vllm.format.errors import FormatError

MAX_DENSE_FACTOR = 2048  # a larger base matrix would cost more than the GEMM behind it
MAX_PALEY_ORDER = 256  # a base matrix costs its order in multiply-adds per feature
CHUNK_ELEMENTS = 2**16  # elements transformed at once, so that they stay in the CPU cache


def hadamard(size: int) -> torch.Tensor:
    """Return the orthonormal Hadamard matrix of the format, [size, size] float64.

    It is the Kronecker product of `hadamard_dense(size)` and a Sylvester matrix, over sqrt(size).
    """
    matrix = hadamard_dense(size)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix / math.sqrt(size)


@cache
def hadamard_dense(size: int) -> torch.Tensor:
    """Return the base matrix of `hadamard(size)`, [order, order] float64, not normalized.

    `size` is order x 2^k; butterflies apply the factor 2^k. The base is [[1]] if `size` is a power of two. Otherwise
    it is Paley's Hadamard matrix (Paley, J. Math. Phys. 12, 1933) of the smallest order that divides `size`, up to
    MAX_PALEY_ORDER, with entries +-1. If neither of Paley's constructions with a prime has such an order, it is the
    discrete Hartley matrix of the odd part of `size`.

    Raises FormatError if the odd part is above MAX_DENSE_FACTOR.
    """
    with torch.device("cpu"):  # the result is cached, so the default device of one model must not decide it
        return _dense(size)


def _dense(size: int) -> torch.Tensor:
    odd = size >> ((size & -size).bit_length() - 1)
    if odd > MAX_DENSE_FACTOR:
        raise FormatError(f"hadamard of {size}: its odd factor {odd} is above {MAX_DENSE_FACTOR}; use smaller blocks")
    order = odd
    while order > 1 and size % order == 0 and order <= MAX_PALEY_ORDER:
        factor = _paley(order)
        if factor is not None:
            return factor
        order *= 2
    angle = torch.arange(odd, dtype=torch.float64)
    angle = torch.outer(angle, angle) % odd * (2 * math.pi / odd)
    return angle.cos() + angle.sin()


def apply_hadamard(x: torch.Tensor) -> torch.Tensor:
    """Return x [..., size] @ hadamard(size) in the dtype of x. The format fixes the order of the operations.

    Every operation rounds. With x viewed as [order, n], where F [order, order] is the base matrix and n = 2^k:

    1. butterflies over n: for h = 1, 2, 4, ..., n / 2, entries a and b that are h apart, in blocks
       of 2 h, become a + b and a - b;
    2. if order > 1, y[j] = x[0] * F[0, j] + x[1] * F[1, j] + ..., from left to right;
    3. multiply by 1 / sqrt(size).
    """
    rows = x.reshape(-1, x.shape[-1]).split(max(1, CHUNK_ELEMENTS // x.shape[-1]))
    return torch.cat([_transform_rows(chunk) for chunk in rows]).view(x.shape)


def _transform_rows(x: torch.Tensor) -> torch.Tensor:
    """Transform x [rows, size]. Rows are the last dimension inside, so that every operation reads contiguous memory."""
    size, factor = x.shape[1], hadamard_dense(x.shape[1]).to(x)
    y = x.view(len(x), len(factor), size // len(factor)).permute(1, 2, 0).contiguous()  # [order, n, rows]
    for _ in range((size // len(factor)).bit_length() - 1):
        # Combine neighbors; sums go to the first half and differences to the second. Entries that were twice as far
        # apart are neighbors in the next step, and the last step restores the original order.
        a, b = y[:, 0::2], y[:, 1::2]
        y = torch.cat((a + b, a - b), 1)
    if len(factor) > 1:
        total = torch.zeros_like(y)
        for weights, entries in zip(factor, y, strict=True):
            total = total + weights[:, None, None] * entries
        y = total
    return (y * (1 / math.sqrt(size))).permute(2, 0, 1).reshape(x.shape)


def _paley(order: int) -> torch.Tensor | None:
    if order % 4:
        return None
    if _is_prime(order - 1) and (order - 1) % 4 == 3:
        core = _jacobsthal(order - 1, sign=-1)
        return core + torch.eye(order, dtype=torch.float64)
    prime = order // 2 - 1
    if _is_prime(prime) and prime % 4 == 1:
        core, eye = _jacobsthal(prime, sign=1), torch.eye(prime + 1, dtype=torch.float64)
        on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, on) + torch.kron(eye, off)
    return None


def _jacobsthal(prime: int, sign: int) -> torch.Tensor:
    """Return the quadratic characters of differences mod `prime`, bordered by ones: [prime + 1, prime + 1]."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[torch.arange(1, prime) ** 2 % prime] = 1.0
    character[0] = 0.0
    index = torch.arange(prime)
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 0] = 1.0, float(sign)
    core[1:, 1:] = character[(index[:, None] - index) % prime]
    return core


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
