"""Input transform and activation quantiser on the CPU; semantics: kernels/reference."""

import torch


def rotate_quantize(
    x: torch.Tensor, matrices: list[torch.Tensor], clip: torch.Tensor, num_bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the reference, with the same float32 operations per row whatever the number of rows."""
    y = rotate(x.float(), matrices).view(len(x), len(clip), -1)  # [tokens, groups, group_size]
    qmax = 2**num_bits - 1
    low, high = torch.aminmax(y, dim=-1)
    low, high = low.clamp_(max=0).mul_(clip[:, 0]), high.clamp_(min=0).mul_(clip[:, 1])
    if symmetric:
        scale = torch.maximum(-low, high).div_(2 ** (num_bits - 1) - 1).clamp_(min=1e-12)
        zero = torch.full_like(scale, 2 ** (num_bits - 1))
    else:
        scale = (high - low).div_(qmax).clamp_(min=1e-12)
        zero = torch.round(-low / scale)
    codes = (y / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, qmax)
    return codes.to(torch.uint8).view(x.shape), scale, zero.to(torch.int32)


def rotate(x: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
    """x [tokens, K] float32 times the transform that `matrices` stands for (see the reference)."""
    if not matrices:
        return x
    if matrices[0].dim() == 3:
        return _rotate_blocks(x, matrices[0])
    y, rest = x, 1
    for matrix in matrices:
        rest *= len(matrix)
    for matrix in matrices:
        rest //= len(matrix)
        y = _apply_factor(y, matrix, rest)
    return y.view(x.shape)


def _apply_factor(x: torch.Tensor, matrix: torch.Tensor, rest: int) -> torch.Tensor:
    size = len(matrix)
    if rest == 1:
        return matmul_rows(x.reshape(-1, size), matrix)
    # One small product per row and block, so that its summation order cannot depend on the batch.
    y = x.reshape(-1, size, rest)
    return torch.bmm(matrix.t().expand(len(y), size, size), y)


def _rotate_blocks(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    rows = x.view(len(x), len(blocks), -1).transpose(0, 1)  # [blocks, tokens, b]
    if len(x) == 1:  # see matmul_rows
        rows = rows.expand(-1, 2, -1)
    return torch.bmm(rows, blocks)[:, : len(x)].transpose(0, 1).reshape(x.shape)


def matmul_rows(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x [rows, n] @ matrix [n, m]; a single row is computed as two.

    BLAS serves one row by a matrix-vector product that sums in another order than the product of
    matrices does; a last bit of difference may become another 4-bit code.
    """
    return (x.expand(2, -1) @ matrix)[:1] if len(x) == 1 else x @ matrix
