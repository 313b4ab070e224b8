"""What the name "hadamard" stands for in a checkpoint, for any size: a matrix, and how it is applied."""

import math
from functools import cache

import torch

from infoquant_vllm.format.errors import FormatError

MAX_DENSE_FACTOR = 2048  # an odd factor above this would cost more than the product it serves
MAX_PALEY_ORDER = 256  # a dense factor costs its order in multiply-adds per feature
CHUNK_ELEMENTS = 2**16  # of rows transformed at a time, few enough for the processor's cache


def hadamard(size: int) -> torch.Tensor:
    """The orthonormal matrix [size, size], float64, that the format calls Hadamard.

    It is the Kronecker product of `hadamard_dense(size)` and a Sylvester matrix, over sqrt(size).
    """
    matrix = hadamard_dense(size)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix / math.sqrt(size)


@cache
def hadamard_dense(size: int) -> torch.Tensor:
    """The factor of `hadamard(size)` that takes more than butterflies, [order, order] float64, not normalized.

    [[1]] where `size` is a power of two. Else Paley's Hadamard matrix (Paley, J. Math. Phys. 12,
    1933) of the smallest fitting order up to MAX_PALEY_ORDER, entries +-1, its order a multiple of
    4; or, where neither of his constructions with a prime gives one, the discrete Hartley matrix of
    the odd part of `size`. The rest, size / order, is a power of two.

    Raises FormatError where the odd part is above MAX_DENSE_FACTOR.
    """
    with torch.device("cpu"):  # whatever device a model is being loaded on: it is kept for all of them
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
    """x [..., size] @ hadamard(size), in the dtype of x. Every operation rounds, and their order is the format's.

    With x as [order, n], order that of the dense factor F and n a power of two:

    1. butterflies over n: for h = 1, 2, 4, ..., n / 2, entries a and b that are h apart, in blocks
       of 2 h, become a + b and a - b;
    2. where order > 1, y[j] = x[0] * F[0, j] + x[1] * F[1, j] + ..., from left to right;
    3. all times 1 / sqrt(size).
    """
    rows = x.reshape(-1, x.shape[-1]).split(max(1, CHUNK_ELEMENTS // x.shape[-1]))
    return torch.cat([_transform_rows(chunk) for chunk in rows]).view(x.shape)


def _transform_rows(x: torch.Tensor) -> torch.Tensor:
    """`apply_hadamard` of x [rows, size]; the rows come last meanwhile, so that all of it is over contiguous runs."""
    size, factor = x.shape[1], hadamard_dense(x.shape[1]).to(x)
    y = x.view(len(x), len(factor), size // len(factor)).permute(1, 2, 0).contiguous()  # [order, n, rows]
    for _ in range((size // len(factor)).bit_length() - 1):
        # Neighbours meet, sums go to the first half and differences to the second: what was twice as
        # far apart are neighbors now, and after the last step everything is back in its place.
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
    """Quadratic characters of differences mod `prime`, bordered by ones: [prime + 1, prime + 1]."""
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
