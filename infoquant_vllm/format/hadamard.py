"""The matrix that the name "hadamard" stands for in a checkpoint, for any size."""

import math
from functools import cache, reduce

import torch

from infoquant_vllm.format.errors import FormatError

MAX_DENSE_FACTOR = 2048  # an odd factor above this would cost more than the product it serves
MAX_PALEY_ORDER = 256  # a dense factor costs its order in multiply-adds per feature
MAX_SYLVESTER_DOUBLINGS = 6


@cache
def hadamard_factors(size: int) -> tuple[torch.Tensor, ...]:
    """Small orthonormal float64 matrices whose Kronecker product, in order, is `hadamard(size)`.

    First a dense factor F where `size` is no power of two, then Sylvester matrices of at most
    64, as even as can be. F is Paley's Hadamard matrix (Paley, J. Math. Phys. 12, 1933) of the
    smallest fitting order up to MAX_PALEY_ORDER, or, where neither of his constructions with a
    prime gives one, the discrete Hartley matrix of the odd part of `size`.

    Raises FormatError where the odd part is above MAX_DENSE_FACTOR.
    """
    odd = size >> ((size & -size).bit_length() - 1)
    if odd > MAX_DENSE_FACTOR:
        raise FormatError(f"hadamard of {size}: its odd factor {odd} is above {MAX_DENSE_FACTOR}; use smaller blocks")
    dense = _dense_factor(size, odd)
    factors = [] if len(dense) == 1 else [dense]
    doublings = (size // len(dense)).bit_length() - 1
    parts = -(-doublings // MAX_SYLVESTER_DOUBLINGS)
    factors += [_sylvester(2 ** ((doublings + part) // parts)) for part in reversed(range(parts))]
    return tuple(factors or [dense])


def hadamard(size: int) -> torch.Tensor:
    """The orthonormal matrix [size, size], float64, that the format calls Hadamard."""
    return reduce(torch.kron, hadamard_factors(size))


def _dense_factor(size: int, odd: int) -> torch.Tensor:
    order = odd
    while order > 1 and size % order == 0 and order <= MAX_PALEY_ORDER:
        factor = _paley(order)
        if factor is not None:
            return factor / math.sqrt(order)
        order *= 2
    angle = torch.arange(odd, dtype=torch.float64)
    angle = torch.outer(angle, angle) % odd * (2 * math.pi / odd)
    return (angle.cos() + angle.sin()) / math.sqrt(odd)


def _sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while matrix.shape[0] < size:
        matrix = torch.kron(step, matrix)
    return matrix


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
