"""Mixtures of experts by Triton's kernels under its interpreter: slots, products of the reference's bits, sums."""

import pytest
import torch

from infoquant_vllm.kernels.operands import ExpertChoice, ExpertLinear, InputQuant
from tests.common import oracles
from tests.common.guards import guarded
from tests.common.interpreted import DEVICE, experts, linear, rotate_quantize, tiles, weights
from tests.common.moved import moved
from tests.kernels.test_experts import EXPERTS, of, one_by_one, prepared, random_choice, random_weight

HIDDEN, INNER = 192, 96
TOLERANCE = 0.02
"""Of the largest output on a GPU, whose exponentials may round otherwise: then a code moves by one."""
align, grouped_gemm = (
    each if DEVICE == "cpu" else moved(each, DEVICE) for each in (experts.align, experts.grouped_gemm)
)


def choice_of(kind: str, tokens: int = 9, chosen: int = 2) -> ExpertChoice:
    """Experts of tokens: at random, all the same, or some of other ranks."""
    torch.manual_seed(tokens)
    found = random_choice(tokens, chosen)
    if kind == "one expert":
        found.experts[:, 0], found.experts[:, 1:] = 3, -1
    elif kind == "holes":
        found.experts[found.experts == 1] = -1
        found.experts[4] = -1
    elif kind == "elsewhere":
        found.experts.fill_(-1)
    return found


def random_inputs(
    features: int, num_bits: int = 4, groups: int = 1, segments: int = 1, own: bool = False
) -> InputQuant:
    """Quantizers of inputs; own: clip ratios of each expert."""
    clips = 0.7 + 0.3 * torch.rand(EXPERTS, groups * segments, 2)
    clip = None if num_bits == 16 else clips if own else clips[0]
    return InputQuant([], features // segments if own else 0, clip, num_bits, False, segments)


@pytest.mark.parametrize("height", [8, 16])
@pytest.mark.parametrize("kind", ["random", "one expert", "holes", "elsewhere"])
@pytest.mark.parametrize("tokens", [1, 9, 60])
def test_every_row_has_one_place_in_a_slot_of_its_expert(kind: str, tokens: int, height: int) -> None:
    chosen = choice_of(kind, max(tokens, 5)).experts[:tokens]
    with guarded():
        rows, owners, count = align(chosen, EXPERTS, height)
    flat = chosen.flatten()
    assert count == len(flat)
    held = [-(-int((flat == expert).sum()) // height) for expert in range(EXPERTS)]
    expected = [expert for expert, slots in enumerate(held) for _ in range(slots)]
    assert owners.tolist() == expected + [-1] * (len(owners) - len(expected))
    for expert in range(EXPERTS):
        mine = rows[owners == expert].flatten()
        assert mine[mine < count].tolist() == (flat == expert).nonzero()[:, 0].tolist()
        assert (mine[int((flat == expert).sum()) :] == count).all()


def test_more_rows_than_a_program_looks_at_together_are_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choice_of("holes", 50).experts
    expected = align(chosen, EXPERTS, 16)
    monkeypatch.setattr(experts, "FEW_CHUNK", 16)
    monkeypatch.setattr(experts, "CHUNK", 32)
    found = align(chosen, EXPERTS, 16)
    used = expected.experts >= 0
    assert torch.equal(found.experts, expected.experts)
    assert torch.equal(found.rows[used], expected.rows[used])


def test_few_tokens_make_no_slots_for_all_experts() -> None:
    assert len(align(random_choice(1, 2).experts, 128, 16).experts) == 2
    assert len(align(random_choice(4, 4).experts, 128, 16).experts) == 16


@pytest.mark.parametrize("shared", [True, False], ids=["rows of tokens", "routed rows"])
@pytest.mark.parametrize(
    ("input_bits", "weight_bits", "symmetric", "groups", "segments"),
    [
        *((4, 4, True, 1, 1), (4, 4, False, 1, 2), (4, 4, True, 3, 1), (4, 4, False, 6, 3), (8, 4, False, 3, 1)),
        *((8, 4, True, 1, 3), (4, 8, False, 1, 1), (8, 8, False, 1, 1), (16, 4, False, 6, 1), (16, 8, True, 1, 1)),
    ],
)
def test_products_are_the_references_bits(
    input_bits: int, weight_bits: int, symmetric: bool, groups: int, segments: int, shared: bool
) -> None:
    choice = choice_of("holes", 9)
    rows = choice.experts.numel()
    x = torch.randn(9 if shared else rows, HIDDEN)
    given = ExpertLinear(
        random_inputs(HIDDEN, input_bits, 1, segments), random_weight(48, HIDDEN, symmetric, groups, weight_bits)
    )
    (ours,) = prepared(linear, (given,), weight_bits)
    plan = experts.grouped_plan(ours, HIDDEN, rows)
    with_sums = ours.weight.zero_point is not None
    codes = rotate_quantize.rotate_quantize(x, ours.inputs, plan.values_stride // segments, with_sums)
    with guarded():
        slots = align(choice.experts, EXPERTS, plan.tile.block_m // (2 if input_bits == 16 else 1))
        found = grouped_gemm(codes, ours, plan, slots, torch.float32)
    assert found.shape == (rows, 48)
    for row, expert in enumerate(choice.experts.flatten().tolist()):
        if expert >= 0:
            token = x[row // 2 if shared else row][None]
            assert torch.equal(found[row], oracles.linear(token, *of(expert, given), None)[0])


class Mixture:
    """A whole mixture of random weights, and what the oracles make of it."""

    def __init__(
        self,
        bits: tuple[int, int] = (4, 4),
        symmetric: bool = True,
        groups: int = 1,
        segments: int = 1,
        inner: int = INNER,
    ):
        torch.manual_seed(inner)
        gate_up = random_inputs(HIDDEN, bits[0])
        down = random_inputs(inner, bits[1], segments=segments, own=True)
        self.linears = (
            ExpertLinear(gate_up, random_weight(2 * inner, HIDDEN, symmetric, groups)),
            ExpertLinear(down, random_weight(HIDDEN, inner, symmetric, groups)),
        )

    def found(self, x: torch.Tensor, choice: ExpertChoice) -> torch.Tensor:
        with guarded():
            return experts.experts(x, choice, *prepared(linear, self.linears))

    def check(self, x: torch.Tensor, choice: ExpertChoice) -> None:
        """Exactly under the interpreter, but for float32, whose last bits of SwiGLU may differ."""
        found, expected = self.found(x, choice), one_by_one(x, choice, *self.linears)
        assert found.dtype == x.dtype
        largest = float(expected.abs().max()) if len(expected) else 0.0
        if DEVICE != "cpu":
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * largest)
        elif x.dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * largest)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["random", "one expert", "holes", "elsewhere"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_mixture_is_the_references(kind: str, dtype: torch.dtype) -> None:
    Mixture().check(torch.randn(9, HIDDEN).to(dtype), choice_of(kind))


@pytest.mark.parametrize(("tokens", "chosen"), [(0, 2), (1, 1), (1, 5), (2, 3), (40, 4)])
def test_any_number_of_tokens_and_experts_is_served(tokens: int, chosen: int) -> None:
    Mixture(symmetric=False).check(torch.randn(tokens, HIDDEN).bfloat16(), random_choice(tokens, chosen))


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 3, "symmetric": False},
        {"groups": 3, "segments": 3},
        {"symmetric": False, "segments": 3},
        {"bits": (8, 8)},
        {"bits": (4, 8), "groups": 3, "symmetric": False},
        {"bits": (16, 4)},
        {"bits": (16, 16)},
        {"inner": 1184},
    ],
    ids=str,
)
def test_all_formats_are_served(options: dict[str, object]) -> None:
    """1184 features have a Hadamard whose base matrix of 148 no program holds."""
    Mixture(**options).check(torch.randn(7, HIDDEN).bfloat16(), choice_of("holes", 7))  # type: ignore[arg-type]


def test_tiles_have_room_for_the_tokens_of_an_expert() -> None:
    heights = {rows: tiles.grouped_tile(rows, weights.layout(HIDDEN, 1)).block_m for rows in (1, 8, 9, 32, 64, 2000)}
    assert heights == {1: 16, 8: 16, 9: 32, 32: 64, 64: 128, 2000: 128}


def test_a_token_that_is_no_number_leaves_others_alone() -> None:
    mixture, choice = Mixture(), choice_of("random")
    x = torch.randn(9, HIDDEN).bfloat16()
    clean = mixture.found(x, choice)
    x[4, 7] = torch.nan
    found = mixture.found(x, choice)
    others = torch.arange(9) != 4
    assert found[4].isnan().all()
    assert torch.equal(found[others], clean[others])
