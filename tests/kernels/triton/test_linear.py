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
    """A random product of `input_bits` codes and `weight_bits` weights, as the checkpoint format has them."""

    def __init__(
        self,
        tokens: int,
        features: int,
        groups: tuple[int, int] = (1, 1),
        bits: tuple[int, int] = (4, 4),
        signed: bool = True,
        channels: int = 48,
    ):
        torch.manual_seed(tokens)
        self.bits, self.groups, self.signed = bits, groups, signed
        low = -(2 ** (bits[1] - 1)) if signed else 0
        self.packed = pack_codes(torch.randint(low, low + 2 ** bits[1], (channels, features)), bits[1], signed)
        self.codes = torch.randint(0, 2 ** bits[0], (tokens, features), dtype=torch.uint8)
        self.scale = torch.rand(tokens, groups[0]) + 0.5
        self.zero = torch.randint(0, 2 ** bits[0], (tokens, groups[0]), dtype=torch.int32)
        self.weight_scale = torch.rand(channels, groups[1]) + 0.5
        self.weight_zero = None if signed else torch.randint(0, 2 ** bits[1], (channels, groups[1]), dtype=torch.uint8)
        self.bias = torch.randn(channels)

    def expected(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        weight = self.packed, self.weight_scale, self.weight_zero, self.bias
        return oracles.quantized_linear(self.codes, self.scale, self.zero, *weight, dtype)

    def found(self, tile: Any, dtype: torch.dtype = torch.float32, int16: bool = False) -> torch.Tensor:
        features, groups = self.codes.shape[1], max(self.groups)
        weight = weights.prepare_weight(self.packed, self.bits[1], self.signed, groups)
        grids = [
            None if grid is None else weights.prepare_qparams(grid) for grid in (self.weight_scale, self.weight_zero)
        ]
        block_k = weights.layout(features, groups, self.bits[1]).block_k(tile.block_k)
        tile = tile._replace(block_k=block_k)
        codes = self.stored()
        with guarded():
            return linear.gemm(codes, features, PackedWeight(weight, *grids), self.bias, dtype, tile, int16)

    def stored(self) -> Any:
        """The codes as the quantizer leaves them; whatever was there is behind them."""
        (tokens, features), groups = self.codes.shape, max(self.groups)
        center = self.zero if self.bits[0] == 4 else torch.full_like(self.zero, 128)
        codes = self.codes.int() - center.repeat_interleave(features // self.groups[0], 1)
        padded = weights.layout(features, groups, self.bits[1]).padded
        values = torch.randint(-128, 128, (tokens, padded), dtype=torch.int8)
        values[:, :features] = codes
        sums = codes.view(tokens, groups, features // groups).sum(-1, dtype=torch.int32).t().contiguous()
        rest = None if self.bits[0] == 4 else (self.zero - 128).t().contiguous()
        return linear.Codes(values, self.scale.t().contiguous(), rest, None if self.signed else sums)

    def check(self) -> None:
        assert torch.equal(self.found(WHOLE), self.expected())
        split = self.found(SPLIT)
        assert torch.equal(split, self.found(SPLIT))
        if max(self.groups) == 1:
            assert torch.equal(split, self.expected())
        else:
            assert (split - self.expected()).abs().max() <= 1e-5 * self.expected().abs().max()


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("features", [96, 576])
def test_tokens_channels_and_features_need_not_fill_tiles(tokens: int, features: int) -> None:
    Case(tokens, features).check()


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (4, 8), (8, 8)])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (3, 1), (1, 3), (3, 3), (6, 3), (3, 6)])
def test_bits_zero_points_and_groups_are_those_of_the_reference(
    bits: tuple[int, int], signed: bool, groups: tuple[int, int]
) -> None:
    Case(7, 192, groups, bits, signed, channels=16).check()


@pytest.mark.parametrize(
    ("features", "groups"), [(384, (3, 1)), (512, (1, 2)), (192, (2, 2)), (384, (2, 1)), (288, (3, 9))]
)
def test_groups_of_32_to_256_features_are_those_of_the_reference(features: int, groups: tuple[int, int]) -> None:
    Case(3, features, groups, signed=False, channels=16).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [WHOLE, SPLIT])
def test_outputs_of_16_bits_are_rounded_as_torch_rounds(dtype: torch.dtype, tile: Any) -> None:
    case = Case(33, 256)
    case.scale /= 64  # within the range of float16
    assert torch.equal(case.found(tile, dtype), case.expected(dtype))


@pytest.mark.parametrize("tile", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize(
    ("tokens", "groups", "bits"), [(1, (1, 1), (8, 8)), (19, (1, 1), (8, 4)), (5, (1, 3), (8, 4)), (17, (1, 3), (8, 8))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_high_and_low_bytes_of_a_token_are_added_as_the_reference_adds(
    tile: Any, tokens: int, groups: tuple[int, int], bits: tuple[int, int], dtype: torch.dtype
) -> None:
    case = Case(2 * tokens, 384, groups, bits, signed=groups == (1, 1))
    case.scale[::2] *= 256
    bias, case.bias = case.bias, None
    expected = oracles.add_bytes(case.expected(), bias, dtype)
    case.bias = bias
    found = case.found(tile, dtype, int16=True)
    assert found.dtype == dtype
    if groups == (1, 1) or tile == WHOLE:
        assert torch.equal(found, expected)
    else:
        error = 1e-5 if dtype == torch.float32 else 1e-2
        assert (found.float() - expected.float()).abs().max() <= error * expected.float().abs().max()


def test_many_tiles_of_tokens_are_each_done_once() -> None:
    case = Case(150, 128, channels=32)
    assert torch.equal(case.found(WHOLE._replace(block_n=16, block_m=16)), case.expected())


def test_sums_of_the_widest_rows_are_exact() -> None:
    case = Case(2, 28672, bits=(8, 4), signed=False, channels=16)
    case.packed.fill_(0xFF)
    case.codes.fill_(255)
    case.zero.fill_(0)
    case.weight_zero.fill_(0)
    case.check()


def test_no_tokens_and_no_bias() -> None:
    case = Case(3, 128)
    case.bias = None
    case.check()
    case.codes, case.scale, case.zero = case.codes[:0], case.scale[:0], case.zero[:0]
    assert case.found(WHOLE).shape == (0, 48)


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_the_tables_tile_serves(tokens: int) -> None:
    for case in (Case(tokens, 512), Case(tokens, 512, (4, 8), signed=False)):
        layout = weights.layout(512, max(case.groups), 4)
        tile = tiles.linear_tile(80, tokens, 48, layout)
        assert (case.found(tile) - case.expected()).abs().max() <= 1e-5 * case.expected().abs().max()


@pytest.mark.parametrize("ptx", [common._LOW_SIGNED.value, common._HIGH_SIGNED.value])
def test_both_ways_to_unpack_do_the_same(ptx: str) -> None:
    """The interpreter's, a byte at a time, and the PTX's, four at a time, whose two instructions are done here."""
    words = torch.randint(-(2**31), 2**31, (1000,)).int()
    registers = {"$1": words}
    for name, target, source, number in re.findall(r"(shl|and)\.b32 (\S+), (\S+), (\w+);", ptx):
        value = int(number, 0)
        registers[target] = registers[source] << value if name == "shl" else registers[source] & (value - 2**32)
    codes = words.view(torch.int8)
    expected = codes << 4 if ptx == common._LOW_SIGNED.value else codes & -16
    assert torch.equal(registers["$0"].view(torch.int8), expected)
    assert torch.equal(
        expected.int(),
        unpack_codes(codes.view(torch.uint8)[:, None], 4, True)[:, int(ptx == common._HIGH_SIGNED.value)]
        * common.NIBBLE_FACTOR.value,
    )


def test_what_the_kernels_do_not_serve_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match="9 groups of 126"):
        weights.layout(126, 9, 4)
    with pytest.raises(ValueError, match="24 channels"):
        weights.prepare_weight(torch.zeros(24, 64, dtype=torch.uint8), 4, True, 1)


def test_rows_of_an_8_bit_weight_are_found_again() -> None:
    packed = torch.randint(0, 256, (64, 96), dtype=torch.uint8)
    weight, rows = weights.prepare_weight(packed, 8, True, 1), torch.tensor([[3, 63], [0, 3]])
    assert torch.equal(weights.weight_rows(weight, rows, 96), packed.view(torch.int8)[rows])
