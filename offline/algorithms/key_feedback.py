"""Error feedback for keys: what the error of each rounded feature adds to the features that are rounded after it.

An error e of a key changes the score of a query q by q . e, so e^T M e should be small, with M the second moment of
queries, rather than |e|^2. Rounding feature after feature, with each error compensated by those to come, is what GPTQ
does to a row of weights (Frantar et al., arXiv 2210.17323, section 3); here it happens to every key when it is stored.

RoPE turns queries with their position, so M is a mean over positions. One for the first few hundred positions serves
these best and does harm some thousand positions further, so positions are spaced evenly on a logarithmic scale.
"""

import torch

from infoquant_vllm.format import hadamard
from offline.algorithms.key_mean import rotate

DAMPENING_FRAC = 0.01
"""Added to the diagonal of M, as a share of its mean."""
FIRST_POSITIONS = 512
"""About so many first positions are spaced evenly."""
SAMPLES = 192


def log_spaced_positions(count: int) -> torch.Tensor:
    """Return positions 0 .. count - 1 to take means over, int64: dense up to FIRST_POSITIONS, then ever sparser."""
    steps = torch.linspace(0, 1, SAMPLES, dtype=torch.float64)
    spread = FIRST_POSITIONS * ((1 + count / FIRST_POSITIONS) ** steps - 1)
    return spread.floor().long().clamp(max=count - 1)


def mean_rotated_moment(moment: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the mean over positions of the second moment [kv_heads, head_dim, head_dim] of queries after RoPE.

    cos, sin: [positions, rotary_dim], of RoPE
    """
    total = torch.zeros_like(moment)
    for one_cos, one_sin in zip(cos, sin, strict=True):
        rows = rotate(moment, one_cos, one_sin)
        total += rotate(rows.mT, one_cos, one_sin)
    return total / len(cos)


def feedback_matrix(moment: torch.Tensor, transformed: bool) -> torch.Tensor:
    """Return the feedback of `round_with_feedback` [kv_heads, head_dim, head_dim] float32, strictly upper triangular.

    With U the upper Cholesky factor of the inverse of M, -U_ij / U_ii (GPTQ, section 3.3).

    moment: M, of queries after RoPE; transformed: keys and queries go through R3
    """
    moment = moment.double()
    size = moment.shape[-1]
    if transformed:
        matrix = hadamard(size).to(moment)
        moment = matrix.T @ moment @ matrix
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(size).to(moment)
    damped = moment + (DAMPENING_FRAC * mean).clamp(min=torch.finfo(torch.float32).tiny) * eye
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    return (-factor / factor.diagonal(dim1=-2, dim2=-1)[..., None]).triu(1).float()
