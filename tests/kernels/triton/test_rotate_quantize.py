"""The Triton quantizer under Triton's interpreter: the reference's bits, and next to them behind matrices."""

import pytest
import torch

from infoquant_vllm.format import pack_codes
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from tests.common import oracles
from tests.common.guards import SENTINEL, guarded
from tests.common.interpreted import linear, rotate_quantize

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
    symmetric: bool = False,
    segments: int = 1,
    flips: float = 0.0,
    mean: torch.Tensor | None = None,
) -> None:
    """Values, scales, offsets and sums are the reference's; a share of the codes may be off by one."""
    (matrices, hadamard), (tokens, features) = given, x.shape
    inputs = InputQuant(matrices, hadamard, clip, num_bits, symmetric, segments, mean)
    values, scale, offset = oracles.rotate_quantize(x, inputs)
    prepared = inputs._replace(matrices=linear.prepare_matrices(matrices, hadamard))
    part = features // segments
    with guarded():
        found = rotate_quantize.rotate_quantize(x, prepared, part + 64, with_sums=True)
    stored = found.values.view(len(values), segments, part + 64)
    assert (stored[..., part:] == SENTINEL).all()
    ours = stored[..., :part].flatten(1).int()
    wrong = ours != values
    if flips and num_bits == 16:  # a carry in the low byte
        step = (ours - values.int()).view(tokens, 2, features)
        assert (256 * step[:, 0] + step[:, 1]).abs().max() <= 1
    else:
        most = 16 if flips and segments < (1 if clip is None else len(clip)) else 1  # a code is up to 127 / 8
        assert ((ours - values.int()).abs() <= (most if flips else 0)).all()
        assert wrong.sum() <= flips * wrong.numel()
    torch.testing.assert_close(found.scale.t(), scale, rtol=1e-6 if flips else 0, atol=0)
    if offset is not None:
        assert torch.equal(torch.zeros_like(offset) if found.zp_offset is None else found.zp_offset.t(), offset)
    assert torch.equal(found.sums, stored[..., :part].sum(-1, dtype=torch.int32).t())


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("features", "kind"), [(576, "none"), (96, "none"), (256, "hadamard 256"), (512, "hadamard 64")]
)
def test_codes_are_the_references(tokens: int, dtype: torch.dtype, features: int, kind: str) -> None:
    torch.manual_seed(tokens)
    x = (3 * torch.randn(tokens, features)).to(dtype)
    check(x, transform(kind, features), 0.7 + 0.3 * torch.rand(1, 2), 4)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    ("features", "kind", "groups", "segments"),
    [
        (576, "none", 1, 1),
        (576, "none", 9, 1),
        (512, "hadamard 64", 2, 2),
        (512, "hadamard 128", 1, 1),
        (384, "hadamard 384", 1, 1),
    ],
)
def test_codes_of_inputs_less_their_mean_are_the_references(
    tokens: int, features: int, kind: str, groups: int, segments: int
) -> None:
    torch.manual_seed(tokens)
    mean, clip = 3 * torch.randn(features), 0.7 + 0.3 * torch.rand(groups, 2)
    x = (mean + torch.randn(tokens, features)).bfloat16()
    flips = FLIPS if kind == "hadamard 384" else 0.0
    check(x, transform(kind, features), clip, 4, segments=segments, flips=flips, mean=mean)


def spread(tokens: int, features: int) -> torch.Tensor:
    """Activations whose groups differ by magnitudes, so that ratios do."""
    magnitude = 4 ** torch.randn(tokens, features // 32).repeat_interleave(32, 1)
    return (magnitude * torch.randn(tokens, features)).bfloat16()


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 384])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("kind", "tokens"), [("none", 5), ("none", 40), ("hadamard 128", 5)])
def test_groups_that_share_a_scale_are_the_references(group_size: int, symmetric: bool, kind: str, tokens: int) -> None:
    if group_size == 96 and kind != "none":
        pytest.skip("refused: a group lies across blocks")
    torch.manual_seed(0)
    clip = 0.7 + 0.3 * torch.rand(384 // group_size, 2)
    check(spread(tokens, 384), transform(kind, 384), clip, 4, symmetric)


@pytest.mark.parametrize("segments", [2, 3])
@pytest.mark.parametrize(
    ("kind", "groups", "num_bits"),
    [("none", 6, 4), ("none", 12, 4), ("hadamard 64", 6, 4), ("none", 0, 4), ("none", 0, 8), ("hadamard 32", 0, 8)],
)
def test_each_segment_is_quantized_by_itself(kind: str, groups: int, num_bits: int, segments: int) -> None:
    torch.manual_seed(0)
    clip = 0.7 + 0.3 * torch.rand(groups or segments, 2)
    check(spread(5, 384), transform(kind, 384), clip, num_bits, segments=segments)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_bits_are_the_references(num_bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    check(torch.randn(5, 384).bfloat16(), ([], 128), torch.tensor([[0.9, 0.8]]), num_bits, symmetric)


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
    check(x, transform(kind, 384), clip, num_bits, flips=FLIPS)


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("hadamard 384", 3),
        ("hadamard 192", 2),
        ("blocks 192", 6),
        ("blocks 64", 2),
        ("blocks 32", 12),
        ("kronecker 12", 12),
    ],
)
def test_groups_behind_matrices(kind: str, groups: int) -> None:
    torch.manual_seed(0)
    clip = 0.7 + 0.3 * torch.rand(groups, 2)
    check(torch.randn(5, 384).bfloat16(), transform(kind, 384), clip, 4, flips=FLIPS)


@pytest.mark.parametrize("kind", ["hadamard 96", "hadamard 192"])
@pytest.mark.parametrize("num_bits", [4, 16])
def test_blocks_that_are_no_power_of_two_in_a_row_of_several(kind: str, num_bits: int) -> None:
    torch.manual_seed(0)
    clip = None if num_bits == 16 else 0.7 + 0.3 * torch.rand(1, 2)
    check(torch.randn(5, 384).bfloat16(), transform(kind, 384), clip, num_bits, flips=FLIPS)


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
        check(rows, transform(kind, 64), None, 16)
        return
    for clip, groups in ((1.0, 1), (0.5, 1), (0.0, 1), (1.0, 2), (0.0, 2)):
        for symmetric in (False, True):
            if groups == 1 or num_bits == 4:
                check(rows, transform(kind, 64), torch.full((groups, 2), clip), num_bits, symmetric)


def test_rows_may_lie_apart_and_features_too() -> None:
    wide, clip = torch.randn(4, 1024).bfloat16(), torch.ones(1, 2)
    check(wide[:, 128:640], ([], 512), clip, 4)
    check(wide[:, ::2], ([], 512), clip, 4)
    check(wide[:0, :512], ([], 512), clip, 4)


def test_what_the_kernels_do_not_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="do not nest"):
        rotate_quantize.segment(288, (1, 64), 288)
    with pytest.raises(ValueError, match="groups of 96"):
        rotate_quantize.segment(384, (3, 128), 96).padded_group(96)
    with pytest.raises(ValueError, match=r"groups of 64 .* whole in a block"):
        rotate_quantize.segment(384, (12, 8), 384).padded_group(64)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize(
    ("kind", "groups", "weight_groups", "num_bits", "segments"),
    [
        ("none", 1, 1, 4, 1),
        ("hadamard 128", 1, 1, 4, 1),
        ("hadamard 64", 8, 4, 4, 2),
        ("hadamard 64", 1, 4, 8, 1),
        ("none", 2, 1, 8, 2),
        ("none", 1, 4, 16, 1),
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_a_linear_is_the_references(
    tokens: int, kind: str, groups: int, weight_groups: int, num_bits: int, segments: int, signed: bool
) -> None:
    torch.manual_seed(0)
    matrices, hadamard = transform(kind, 256)
    low = -8 if signed else 0
    packed = pack_codes(torch.randint(low, low + 16, (48, 256)), 4, signed)
    zero = None if signed else torch.randint(0, 16, (48, weight_groups), dtype=torch.uint8)
    multiplier = torch.randint(1, 9, (48, weight_groups), dtype=torch.uint8) if weight_groups > 1 else None
    x, clip = torch.randn(tokens, 256).bfloat16(), None if num_bits == 16 else torch.ones(groups, 2)
    inputs = InputQuant(matrices, hadamard, clip, num_bits, symmetric=False, segments=segments)
    weight, bias = PackedWeight(packed, torch.rand(48, 1), multiplier, zero), torch.randn(48).bfloat16()
    prepared = inputs._replace(matrices=linear.prepare_matrices(matrices, hadamard))
    found = linear.linear(x, prepared, linear.prepare_linear(weight, 4, segments), bias)
    assert torch.equal(found, oracles.linear(x, inputs, weight, bias))


def test_matrices_too_wide_for_a_program_are_applied_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate_quantize, "MAX_ORDER", 4)
    check(torch.randn(3, 384).bfloat16(), ([], 96), torch.ones(1, 2), 4, flips=FLIPS)
    monkeypatch.setattr(rotate_quantize, "MAX_FEATURES", 383)
    for kind in ("hadamard 384", "kronecker 12"):
        check(torch.randn(3, 384).bfloat16(), transform(kind, 384), torch.ones(3, 2), 4, flips=FLIPS)
