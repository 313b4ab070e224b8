"""The compiled quantized linear against the reference, bit by bit, of every library that this CPU can run."""

from collections.abc import Iterator

import pytest
import torch

from infoquant_vllm.format import pack_codes
from infoquant_vllm.kernels.cpu import kernels
from infoquant_vllm.kernels.cpu.library import DTYPES, operations
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from tests.common import oracles
from tests.common.libraries import RUNNABLE, library


@pytest.fixture(autouse=True, scope="module", params=RUNNABLE)
def _library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each library in turn."""
    with library(request.param):
        yield


class Layer:
    """Random weights and activations, and their product by the reference and by the library."""

    def __init__(
        self,
        rows: int,
        channels: int = 35,
        features: int = 576,
        bits: tuple[int, int] = (4, 4),
        signed: bool = True,
        groups: tuple[int, int] = (1, 1),
    ):
        torch.manual_seed(rows)
        (weight_bits, self.num_bits), (weight_groups, input_groups) = bits, groups
        low = -(2 ** (weight_bits - 1)) if signed else 0
        self.packed = pack_codes(torch.randint(low, low + 2**weight_bits, (channels, features)), weight_bits, signed)
        self.weight = kernels.prepare_weight(self.packed, weight_bits, signed, max(groups))
        self.scale = (torch.rand(channels, weight_groups) + 0.5) / features**0.5
        zeros = torch.randint(0, 2**weight_bits, (channels, weight_groups), dtype=torch.uint8)
        self.zero = None if signed else zeros
        self.bias: torch.Tensor | None = torch.randn(channels)
        codes = torch.randint(0, 2**self.num_bits, (rows, features), dtype=torch.uint8)
        zero = torch.randint(0, 2**self.num_bits, (rows, input_groups), dtype=torch.int32)
        self.inputs = codes, torch.rand(rows, input_groups) + 0.5, zero

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        return oracles.quantized_linear(*self.inputs, self.packed, self.scale, self.zero, self.bias, dtype)

    def found(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        zero = None if self.zero is None else kernels.prepare_qparams(self.zero)
        inputs = [each[rows] for each in self.inputs]
        grid = kernels.prepare_qparams(self.scale)
        return operations().quantized_linear(*inputs, self.weight, grid, zero, self.bias, self.num_bits, DTYPES[dtype])


@pytest.mark.parametrize("rows", [1, 5, 123])
@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 4), (8, 8)])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (1, 9), (9, 1), (9, 9), (9, 18), (9, 3)])
@pytest.mark.parametrize("features", [576, 126])  # groups of 64 and, where padding is needed, of 14
def test_products_are_those_of_the_reference(
    rows: int, bits: tuple[int, int], signed: bool, groups: tuple[int, int], features: int
) -> None:
    layer = Layer(rows, features=features, bits=bits, signed=signed, groups=groups)
    assert torch.equal(layer.found(torch.float32), layer.expected(torch.float32))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 16, 17, 25, 32, 33, 49, 60, 61, 300])
@pytest.mark.parametrize(("channels", "features"), [(16, 64), (129, 2), (288, 1536), (35, 8192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_number_of_rows_and_channels_in_any_dtype(
    rows: int, channels: int, features: int, dtype: torch.dtype
) -> None:
    layer = Layer(rows, channels, features)
    assert torch.equal(layer.found(dtype), layer.expected(dtype))
    layer.bias = None
    assert torch.equal(layer.found(dtype), layer.expected(dtype))


@pytest.mark.parametrize("rows", [0, 1, 5, 123])
@pytest.mark.parametrize(("bits", "signed", "groups"), [(4, True, 1), (4, False, 9), (8, True, 1), (8, False, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_16_bit_inputs_are_those_of_the_reference(
    rows: int, bits: int, signed: bool, groups: int, dtype: torch.dtype
) -> None:
    layer, x = Layer(rows, 1000, bits=(bits, 8), signed=signed, groups=(groups, 1)), torch.randn(rows, 576).to(dtype)
    zero = None if layer.zero is None else kernels.prepare_qparams(layer.zero)
    inputs = InputQuant(kernels.prepare_matrices([], 576), 576, None, 16, symmetric=False)
    weight = PackedWeight(layer.weight, kernels.prepare_qparams(layer.scale), zero)
    found = kernels.linear(x, inputs, weight, layer.bias)
    assert torch.equal(found, oracles.linear_int16(x, [], 576, layer.packed, layer.scale, layer.zero, layer.bias))


TRANSFORMS: dict[str, tuple[list[torch.Tensor], int]] = {
    "none": ([], 0),
    "hadamard of all": ([], 576),
    "hadamard in runs": ([], 64),
    "blocks": ([torch.randn(9, 64, 64)], 0),
    "kronecker": ([torch.randn(18, 18), torch.randn(32, 32)], 0),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("num_bits", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_linear_is_that_of_the_reference(transform: str, num_bits: int, dtype: torch.dtype) -> None:
    layer, (matrices, hadamard) = Layer(7, groups=(9, 1)), TRANSFORMS[transform]
    x = torch.randn(7, 2 * 576).to(dtype)[:, 576:]  # rows that are not next to each other
    clip, bias = None if num_bits == 16 else torch.rand(9, 2), torch.randn(35).to(dtype)
    inputs = InputQuant(matrices, hadamard, clip, num_bits, symmetric=True)
    prepared = inputs._replace(matrices=kernels.prepare_matrices(matrices, hadamard))
    weight = PackedWeight(layer.weight, kernels.prepare_qparams(layer.scale), None)
    found = kernels.linear(x, prepared, weight, bias)
    expected = oracles.linear(x, inputs, PackedWeight(layer.packed, layer.scale, None), bias)
    assert torch.equal(found, expected)


def test_a_transform_without_its_matrix_and_other_dtypes_are_refused() -> None:
    layer = Layer(1)
    weight = PackedWeight(layer.weight, kernels.prepare_qparams(layer.scale), None)
    with pytest.raises(RuntimeError, match="dense factor"):
        kernels.linear(torch.randn(1, 576), InputQuant([], 576, torch.ones(1, 2), 4, True), weight, None)
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        kernels.linear(torch.randn(1, 576).double(), InputQuant([], 0, torch.ones(1, 2), 4, True), weight, None)


@pytest.mark.parametrize("features", [576, 126])
def test_rows_of_a_prepared_weight_are_the_checkpoints(features: int) -> None:
    packed = torch.randint(0, 256, (500, features), dtype=torch.uint8)
    rows = torch.tensor([[0, 499, 16], [31, 32, 77]])
    found = kernels.weight_rows(kernels.prepare_weight(packed, 8, True, 1), rows, features)
    assert torch.equal(found, packed.view(torch.int8)[rows])


@pytest.mark.parametrize("groups", [(1, 1), (9, 9)])
@pytest.mark.parametrize("bits", [(4, 4), (4, 8)])
def test_a_row_is_the_same_bits_in_any_batch_on_any_number_of_threads(
    groups: tuple[int, int], bits: tuple[int, int]
) -> None:
    layer, threads = Layer(123, 300, bits=bits, groups=groups), torch.get_num_threads()
    whole = layer.found(torch.float32)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 5, 16, 64, 123):
                assert torch.equal(layer.found(torch.float32, slice(rows)), whole[:rows])
    finally:
        torch.set_num_threads(threads)


def test_the_largest_sums_that_the_format_admits_are_exact() -> None:
    for bits, features, code, weight_code in (((4, 8), 32764, 255, 0), ((8, 8), 32764, 255, 0), ((4, 4), 65536, 0, 15)):
        layer = Layer(1, 32, features, bits, signed=False)
        codes, _, zero = layer.inputs
        codes.fill_(code)
        zero.fill_(0 if code else 15)
        layer.packed.fill_(weight_code * 17)
        layer.weight = kernels.prepare_weight(layer.packed, bits[0], False, 1)
        assert layer.zero is not None
        layer.zero.fill_(0 if weight_code else 2 ** bits[0] - 1)
        assert torch.equal(layer.found(torch.float32), layer.expected(torch.float32))


def test_what_is_not_a_number_stays_so_and_too_large_numbers_become_infinite() -> None:
    layer = Layer(2, 40)
    layer.inputs[1][0] = torch.nan
    layer.inputs[1][1] = 1e36
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = layer.found(dtype)
        assert found[0].isnan().all()
        assert torch.equal(found[1], layer.expected(dtype)[1])


@pytest.mark.parametrize(("bits", "channels"), [(4, 576), (8, 576), (4, 1000)])
def test_prepared_weights_take_the_checkpoints_bytes_but_for_padding(bits: int, channels: int) -> None:
    packed = torch.randint(0, 256, (channels, 576 * bits // 8), dtype=torch.uint8)
    weight = kernels.prepare_weight(packed, bits, True, 9)
    assert weight.nbytes == packed.nbytes // channels * (-(-channels // 32) * 32)
