"""The Triton quantizer under Triton's interpreter: the reference's bits, and next to them behind matrices."""

import pytest
import torch

from infoquant_vllm.format import pack_codes
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from tests.common import oracles
from tests.common.guards import SENTINEL, guarded
from tests.common.interpreted import linear, rotate_quantize, tiles

Transform = tuple[list[torch.Tensor], int]
FLIPS = 2e-3
"""Codes off by one that float32 products are allowed: at a near tie the last bit of a sum decides."""


def transform(kind: str, features: int) -> Transform:
    """Matrices, and the size of a Hadamard, of "hadamard 64", "blocks 32", "kronecker 12" or "none"."""
    name, _, number = kind.partition(" ")
    size = int(number or 0)
    if name == "hadamard":
        return [], size
    if name == "blocks":
        return [torch.linalg.qr(torch.randn(features // size, size, size))[0].contiguous()], 0
    sizes = (size, features // size) if name == "kronecker" else ()
    return [torch.linalg.qr(torch.randn(n, n))[0].contiguous() for n in sizes], 0


def check(
    x: torch.Tensor,
    given: Transform,
    clip: torch.Tensor | None,
    num_bits: int,
    symmetric: bool,
    sum_groups: int = 0,
    flips: float = 0.0,
) -> None:
    """Codes, scales, zero points and sums are the reference's; a share of the codes may be off by one."""
    (matrices, hadamard), (tokens, features) = given, x.shape
    if clip is None:
        codes, scale, zero = oracles.quantize_int16(oracles.apply_transform(x.float(), matrices, hadamard))
    else:
        codes, scale, zero = oracles.rotate_quantize(x, matrices, hadamard, clip, num_bits, symmetric)
    prepared = linear.prepare_matrices(matrices, hadamard)
    with guarded():
        found = rotate_quantize.rotate_quantize(
            x, prepared, hadamard, clip, num_bits, symmetric, features + 64, sum_groups
        )
    assert (found.values[:, features:] == SENTINEL).all()
    center = zero if num_bits == 4 else torch.full_like(zero, 128)
    expected = codes.int() - center.repeat_interleave(features // zero.shape[1], 1)
    values = found.values[:, :features].int()
    wrong = values != expected
    if flips and num_bits == 16:  # a carry in the low byte
        step = (values - expected).view(tokens, 2, features)
        assert (256 * step[:, 0] + step[:, 1]).abs().max() <= 1
    else:
        assert ((values - expected).abs() <= 1).all()
        assert wrong.sum() <= flips * wrong.numel()
    torch.testing.assert_close(found.scale.t(), scale, rtol=1e-6 if flips else 0, atol=0)
    if num_bits != 4:
        offset = torch.zeros_like(zero) if found.zp_offset is None else found.zp_offset.t()
        assert torch.equal(offset, zero - 128)
    if sum_groups:
        sums = values.view(len(values), sum_groups, features // sum_groups).sum(-1)
        assert torch.equal(found.sums, sums.t().int())


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("features", "kind"), [(576, "none"), (96, "none"), (256, "hadamard 256"), (512, "hadamard 64")]
)
def test_codes_are_the_references(tokens: int, dtype: torch.dtype, features: int, kind: str) -> None:
    torch.manual_seed(tokens)
    x = (3 * torch.randn(tokens, features)).to(dtype)
    check(x, transform(kind, features), 0.7 + 0.3 * torch.rand(1, 2), 4, False)


@pytest.mark.parametrize("group_size", [32, 64, 128, 384])
@pytest.mark.parametrize(("num_bits", "symmetric"), [(4, False), (4, True), (8, False), (8, True)])
@pytest.mark.parametrize("kind", ["none", "hadamard 128"])
def test_groups_bits_and_sums_are_the_references(group_size: int, num_bits: int, symmetric: bool, kind: str) -> None:
    torch.manual_seed(0)
    x, clip = torch.randn(5, 384).bfloat16(), 0.7 + 0.3 * torch.rand(384 // group_size, 2)
    finer = 384 // min(group_size, 64)
    check(x, transform(kind, 384), clip, num_bits, symmetric, sum_groups=finer)


@pytest.mark.parametrize(
    "kind",
    [
        "hadamard 384",
        "hadamard 96",
        "hadamard 24",
        "hadamard 6",
        "kronecker 12",
        "kronecker 6",
        "kronecker 96",
        "blocks 192",
        "blocks 64",
        "blocks 16",
    ],
)
@pytest.mark.parametrize(("groups", "num_bits"), [(1, 4), (1, 8), (1, 16)])
@pytest.mark.parametrize("tokens", [3, 40])
def test_products_with_matrices_move_few_codes_by_one(kind: str, groups: int, num_bits: int, tokens: int) -> None:
    torch.manual_seed(tokens)
    x, clip = torch.randn(tokens, 384).bfloat16(), None if num_bits == 16 else 0.7 + 0.3 * torch.rand(groups, 2)
    check(x, transform(kind, 384), clip, num_bits, False, sum_groups=groups, flips=FLIPS)


@pytest.mark.parametrize(
    ("kind", "groups"),
    [("hadamard 384", 3), ("blocks 192", 6), ("blocks 64", 2), ("blocks 32", 12), ("kronecker 12", 12)],
)
def test_groups_behind_matrices(kind: str, groups: int) -> None:
    torch.manual_seed(0)
    clip = 0.7 + 0.3 * torch.rand(groups, 2)
    check(torch.randn(5, 384).bfloat16(), transform(kind, 384), clip, 4, False, sum_groups=12, flips=FLIPS)


@pytest.mark.parametrize(("kind", "groups"), [("hadamard 96", 1), ("hadamard 96", 2), ("hadamard 192", 1)])
@pytest.mark.parametrize("num_bits", [4, 16])
def test_sums_within_blocks_that_are_no_power_of_two(kind: str, groups: int, num_bits: int) -> None:
    torch.manual_seed(0)
    clip = None if num_bits == 16 else 0.7 + 0.3 * torch.rand(groups, 2)
    check(torch.randn(5, 384).bfloat16(), transform(kind, 384), clip, num_bits, False, sum_groups=12, flips=FLIPS)


@pytest.mark.parametrize("num_bits", [4, 8, 16])
@pytest.mark.parametrize("kind", ["none", "hadamard 64"])
def test_extremes_are_the_references(num_bits: int, kind: str) -> None:
    torch.manual_seed(0)
    outlier = torch.randn(64)
    outlier[17] = 1e6
    halves = torch.arange(64) / 2  # values half way between codes: ties
    rows = torch.stack(
        [torch.zeros(64), torch.full((64,), 1e30), torch.full((64,), -3.0), torch.rand(64) * 1e-20, outlier, halves]
    )
    if num_bits == 16:
        check(rows, transform(kind, 64), None, 16, False)
        return
    for clip in (1.0, 0.5, 0.0):
        for symmetric in (False, True):
            check(rows, transform(kind, 64), torch.full((1, 2), clip), num_bits, symmetric)


def test_rows_may_lie_apart_and_features_too() -> None:
    wide, clip = torch.randn(4, 1024).bfloat16(), torch.ones(1, 2)
    check(wide[:, 128:640], ([], 512), clip, 4, False)
    check(wide[:, ::2], ([], 512), clip, 4, False)
    check(wide[:0, :512], ([], 512), clip, 4, False)


def test_what_the_kernels_do_not_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="do not nest"):
        rotate_quantize.segment(576, (1, 64), 96)
    with pytest.raises(ValueError, match="groups of 96"):
        rotate_quantize.segment(384, (3, 128), 96).padded_group(96)
    with pytest.raises(ValueError, match=r"groups of 64 .* whole in a block"):
        rotate_quantize.segment(384, (12, 8), 384).padded_group(64)
    with pytest.raises(ValueError, match="blocks of 7"):
        rotate_quantize.rotate_quantize(
            torch.randn(1, 56), [torch.randn(8, 7, 7)], 0, torch.ones(1, 2), 4, False, 64, 0
        )


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize(
    ("kind", "groups", "weight_groups", "num_bits"),
    [("none", 1, 1, 4), ("hadamard 128", 1, 1, 4), ("hadamard 64", 4, 2, 8), ("none", 1, 2, 16)],
)
@pytest.mark.parametrize("signed", [False, True])
def test_a_linear_is_the_references(
    tokens: int, kind: str, groups: int, weight_groups: int, num_bits: int, signed: bool
) -> None:
    torch.manual_seed(0)
    matrices, hadamard = transform(kind, 256)
    low = -8 if signed else 0
    packed = pack_codes(torch.randint(low, low + 16, (48, 256)), 4, signed)
    scale, bias = torch.rand(48, weight_groups), torch.randn(48).bfloat16()
    zero = None if signed else torch.randint(0, 16, (48, weight_groups), dtype=torch.uint8)
    x, clip = torch.randn(tokens, 256).bfloat16(), None if num_bits == 16 else torch.ones(groups, 2)
    inputs = InputQuant(matrices, hadamard, clip, num_bits, symmetric=False)
    expected = oracles.linear(x, inputs, PackedWeight(packed, scale, zero), bias)
    weight = linear.prepare_weight(packed, 4, signed, max(groups if clip is not None else 1, weight_groups))
    grids = linear.prepare_qparams(scale), None if zero is None else linear.prepare_qparams(zero)
    prepared = inputs._replace(matrices=linear.prepare_matrices(matrices, hadamard))
    found = linear.linear(x, prepared, PackedWeight(weight, *grids), bias)
    exact = tokens > tiles.FEW_TOKENS or max(groups, weight_groups) == 1
    torch.testing.assert_close(found, expected, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-2)


def test_matrices_too_wide_for_a_program_are_applied_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate_quantize, "MAX_ORDER", 4)
    check(torch.randn(3, 384).bfloat16(), ([], 96), torch.ones(1, 2), 4, False, flips=FLIPS)
    monkeypatch.setattr(rotate_quantize, "MAX_FEATURES", 383)
    for kind in ("hadamard 384", "kronecker 12"):
        check(torch.randn(3, 384).bfloat16(), transform(kind, 384), torch.ones(3, 2), 4, False, flips=FLIPS)
