"""The Triton product under Triton's interpreter: the reference's bits."""

import re
from typing import Any

import pytest
import torch

from infoquant_vllm.format import pack_codes, unpack_codes
from infoquant_vllm.kernels.operands import PackedWeight
from tests.common import oracles
from tests.common.guards import guarded
from tests.common.interpreted import common, linear, tiles, weights

WHOLE = tiles.Tile(32, 32, 128, 4, 3)
SPLIT = WHOLE._replace(block_n=16, block_m=16, splits=3)


class Case:
    """A random product of `input_bits` codes and `weight_bits` weights, as the checkpoint format has them.

    groups: of the weights, more than one have multipliers; segments: of the activations.
    """

    def __init__(
        self,
        tokens: int,
        features: int,
        groups: int = 1,
        bits: tuple[int, int] = (4, 4),
        signed: bool = True,
        channels: int = 48,
        segments: int = 1,
    ):
        torch.manual_seed(tokens)
        self.bits, self.segments = bits, segments
        low = -(2 ** (bits[1] - 1)) if signed else 0
        packed = pack_codes(torch.randint(low, low + 2 ** bits[1], (channels, features)), bits[1], signed)
        zero = None if signed else torch.randint(0, 2 ** bits[1], (channels, groups), dtype=torch.uint8)
        multiplier = None
        if groups > 1:
            reach = torch.full((channels, groups), 8) if zero is None else torch.maximum(zero, 15 - zero)
            multiplier = (1 + torch.rand(channels, groups) * (127 // reach)).clamp(max=127 // reach).to(torch.uint8)
        self.weight = PackedWeight(packed, torch.rand(channels, 1) + 0.5, multiplier, zero)
        self.values = torch.randint(-127 if bits[0] == 4 else -128, 128, (tokens, features), dtype=torch.int8)
        self.scale = torch.rand(tokens, segments) + 0.5
        self.offset = None if bits[0] == 4 else torch.randint(-128, 128, (tokens, segments), dtype=torch.int32)
        self.bias: torch.Tensor | None = torch.randn(channels)

    def expected(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return oracles.quantized_linear((self.values, self.scale, self.offset), self.weight, self.bias, dtype)

    def found(self, tile: Any, dtype: torch.dtype = torch.float32, int16: bool = False) -> torch.Tensor:
        weight = linear.prepare_linear(self.weight, self.bits[1], self.segments)
        tile = tile._replace(block_k=self.layout.block_k(tile.block_k))
        codes, features = self.stored(), self.values.shape[1]
        with guarded():
            return linear.gemm(codes, features, weight, self.bias, dtype, tile, int16)

    @property
    def layout(self) -> Any:
        features, multiplier = self.values.shape[1], self.weight.multiplier
        return weights.layout(features, self.segments, None if multiplier is None else features // multiplier.shape[1])

    def stored(self) -> Any:
        """The values as the quantizer leaves them; whatever was there is behind each segment."""
        shape, tokens = self.layout, len(self.values)
        parts = self.values.view(tokens, self.segments, shape.features)
        values = torch.randint(-128, 128, (tokens, self.segments, shape.padded), dtype=torch.int8)
        values[..., : shape.features] = parts
        sums = None if self.weight.zero_point is None else parts.sum(-1, dtype=torch.int32).t().contiguous()
        offset = None if self.offset is None else self.offset.t().contiguous()
        return linear.Codes(values.flatten(1), self.scale.t().contiguous(), offset, sums)

    def check(self) -> None:
        for tile in (WHOLE, SPLIT):
            assert torch.equal(self.found(tile), self.expected())


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("features", [96, 576])
@pytest.mark.parametrize("groups", [1, 3])
def test_tokens_channels_and_features_need_not_fill_tiles(tokens: int, features: int, groups: int) -> None:
    Case(tokens, features, groups).check()


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (4, 8), (8, 8)])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_bits_zero_points_and_segments_are_those_of_the_reference(
    bits: tuple[int, int], signed: bool, segments: int
) -> None:
    Case(7, 192, 1, bits, signed, channels=16, segments=segments).check()


@pytest.mark.parametrize("input_bits", [4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("features", "groups", "segments"),
    [(384, 12, 1), (384, 6, 2), (384, 4, 3), (384, 3, 4), (512, 2, 1), (576, 9, 1), (288, 3, 3), (64, 2, 2)],
)
def test_multipliers_of_groups_of_32_to_256_features_are_those_of_the_reference(
    input_bits: int, signed: bool, features: int, groups: int, segments: int
) -> None:
    Case(3, features, groups, (input_bits, 4), signed, channels=16, segments=segments).check()


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_with_every_zero_point_and_multiplier_is_multiplied_exactly(signed: bool) -> None:
    zero = torch.arange(16).repeat_interleave(16).view(16, 16)
    multiplier = torch.arange(16).repeat(16, 1).clamp(min=1).minimum(127 // torch.maximum(zero, 15 - zero))
    if signed:
        multiplier = torch.arange(16).clamp(1, 15).repeat(16, 1)
    case = Case(32, 512, 16, signed=signed, channels=16)
    low = -8 if signed else 0
    packed = pack_codes((torch.arange(512) % 16 + low).repeat(16, 1), 4, signed)
    case.weight = PackedWeight(
        packed, torch.ones(16, 1), multiplier.to(torch.uint8), None if signed else zero.to(torch.uint8)
    )
    case.values = 127 * torch.eye(512, dtype=torch.int8)[torch.randperm(512)[:32]]
    case.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [WHOLE, SPLIT])
def test_outputs_of_16_bits_are_rounded_as_torch_rounds(dtype: torch.dtype, tile: Any) -> None:
    case = Case(33, 256)
    case.scale /= 1024  # within the range of float16
    assert torch.equal(case.found(tile, dtype), case.expected(dtype))


@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize(
    ("tokens", "groups", "bits"), [(1, 1, (8, 8)), (19, 1, (8, 4)), (5, 3, (8, 4)), (17, 6, (8, 4))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_high_and_low_bytes_of_a_token_are_added_as_the_reference_adds(
    tile: Any, tokens: int, groups: int, bits: tuple[int, int], dtype: torch.dtype
) -> None:
    case = Case(2 * tokens, 384, groups, bits, signed=groups == 1)
    case.scale[::2] *= 256
    bias, case.bias = case.bias, None
    products = case.expected()
    expected = (products[0::2] + products[1::2] + bias).to(dtype)
    case.bias = bias
    found = case.found(tile, dtype, int16=True)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_many_tiles_of_tokens_are_each_done_once() -> None:
    case = Case(150, 128, channels=32)
    assert torch.equal(case.found(WHOLE._replace(block_n=16, block_m=16)), case.expected())


def test_sums_of_the_widest_rows_are_exact() -> None:
    case = Case(2, 28672, bits=(8, 4), signed=False, channels=16)
    case.weight.packed.fill_(0xFF)
    case.values.fill_(127)
    case.offset = torch.full((2, 1), -128, dtype=torch.int32)
    assert case.weight.zero_point is not None
    case.weight.zero_point.fill_(0)
    case.check()


def test_no_tokens_and_no_bias() -> None:
    case = Case(3, 128)
    case.bias = None
    case.check()
    case.values, case.scale = case.values[:0], case.scale[:0]
    assert case.found(WHOLE).shape == (0, 48)


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_the_tables_tile_serves(tokens: int) -> None:
    for case in (Case(tokens, 512), Case(tokens, 512, 8, signed=False), Case(tokens, 512, 2, segments=2)):
        tile = tiles.linear_tile(80, tokens, 48, case.layout)
        assert torch.equal(case.found(tile), case.expected())


def run_ptx(ptx: str, *inputs: torch.Tensor) -> torch.Tensor:
    """$0 of instructions on 32-bit registers, done here one after the other; inputs: $1 and so on, int64."""
    registers = {f"${index}": value for index, value in enumerate(inputs, 1)}
    for name, arguments in re.findall(r"(mov|shl|shr|and|xor|mad\.lo|prmt)\.[bu]32 ([^;]+);", ptx):
        target, *operands = (each.strip() for each in arguments.split(","))
        a, b, c = (*(registers[each] if each in registers else int(each, 0) for each in operands), None, None)[:3]
        match name:
            case "mov":
                found = a
            case "shl":
                found = a << b
            case "shr":
                found = a >> b
            case "and":
                found = a & b
            case "xor":
                found = a ^ b
            case "mad.lo":
                found = a * b + c
            case _:  # selectors of the bytes of $1, and of zeros
                parts = [0 if c >> 4 * i & 4 else a >> 8 * (c >> 4 * i & 3) & 255 for i in range(4)]
                found = sum(part << 8 * i for i, part in enumerate(parts))
        registers[target] = found & 0xFFFFFFFF
    return registers["$0"]


@pytest.mark.parametrize("ptx", [common._LOW_SIGNED.value, common._HIGH_SIGNED.value])
def test_both_ways_to_unpack_do_the_same(ptx: str) -> None:
    """The interpreter's, a byte at a time, and the PTX's, four at a time."""
    is_high = ptx == common._HIGH_SIGNED.value
    codes = torch.randint(-(2**31), 2**31, (1000,)).int().view(torch.int8)
    expected = codes & -16 if is_high else codes << 4
    found = run_ptx(ptx, codes.view(torch.int32).long() & 0xFFFFFFFF)
    assert torch.equal(found.int().view(torch.int8), expected)
    nibbles = unpack_codes(codes.view(torch.uint8)[:, None], 4, True)[:, int(is_high)]
    assert torch.equal(expected.int(), nibbles * common.NIBBLE_FACTOR.value)


def test_both_ways_to_multiply_nibbles_do_the_same() -> None:
    """For every multiplier and zero-point: what the format defines, and what the PTX makes of a word."""
    packed = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    register = packed.view(torch.int32).long() & 0xFFFFFFFF
    for zero in range(16):
        for multiplier in range(1, 127 // max(zero, 15 - zero) + 1):
            pair = torch.tensor([[multiplier, multiplier]]), torch.tensor([[zero, zero]])
            word = weights._words(*pair, weights.layout(128, 1, 64)).long().flatten() & 0xFFFFFFFF
            bytes_of = [run_ptx(ptx.value, word) for ptx in (common._BYTE_0, common._FOUR_OF_BYTE_1)]
            low = run_ptx(common._MULTIPLY_LOW.value, register, *4 * [bytes_of[0]], *4 * [bytes_of[1]])
            assert torch.equal(low.int().view(torch.int8).int(), ((packed & 15).int() - zero) * multiplier)
            bytes_of = [run_ptx(ptx.value, word) for ptx in (common._BYTE_2, common._FOUR_OF_BYTE_3)]
            high = run_ptx(common._MULTIPLY_HIGH.value, register, *4 * [bytes_of[0]], *4 * [bytes_of[1]])
            assert torch.equal(high.int().view(torch.int8).int(), ((packed >> 4).int() - zero) * multiplier)


def test_what_the_kernels_do_not_serve_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match="groups of 48 of 384"):
        weights.layout(384, 1, 48)
    with pytest.raises(ValueError, match="segments of 48"):
        weights.layout(96, 2)
    weight = PackedWeight(torch.zeros(24, 64, dtype=torch.uint8), torch.ones(24, 1), None, None)
    with pytest.raises(ValueError, match="24 channels"):
        weights.prepare_linear(weight, 4, 1)
    with pytest.raises(ValueError, match="a weight of 100 bytes"):
        weights.stored_layout(100, 16, 128, 1, 0)


def test_rows_of_an_8_bit_weight_are_found_again() -> None:
    packed = torch.randint(0, 256, (64, 96), dtype=torch.uint8)
    weight = weights.prepare_linear(PackedWeight(packed, torch.ones(64, 1), None, None), 8, 1)
    rows = torch.tensor([[3, 63], [0, 3]])
    assert torch.equal(weights.weight_rows(weight.packed, rows, 96), packed.view(torch.int8)[rows])
