"""Quantized linears, in torch and by every compiled library that this CPU can run: the oracle's bits."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from infoquant_vllm.format import pack_codes, unpack_codes
from infoquant_vllm.kernels.cpu import kernels as native
from infoquant_vllm.kernels.cpu.library import DTYPES, operations
from infoquant_vllm.kernels.operands import InputQuant, PackedWeight
from infoquant_vllm.kernels.torch import linear as torch_kernels
from infoquant_vllm.kernels.torch.quantize import QuantizedInput
from tests.common import oracles
from tests.common.libraries import RUNNABLE, library

BITS = [(4, 4), (4, 8), (8, 4), (8, 8), (4, 16), (8, 16)]
"""Of weights and of activations."""
TRANSFORMS: dict[str, tuple[list[torch.Tensor], int]] = {
    "none": ([], 0),
    "hadamard of all": ([], 576),
    "hadamard in runs": ([], 64),
    "blocks": ([torch.randn(9, 64, 64)], 0),
    "kronecker": ([torch.randn(18, 18), torch.randn(32, 32)], 0),
}


@pytest.fixture(scope="module", params=["torch", *RUNNABLE])
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Yield those in torch, and those of each library in turn."""
    if request.param == "torch":
        yield torch_kernels
        return
    with library(request.param):
        yield native


@pytest.fixture(scope="module", params=RUNNABLE)
def compiled(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Yield those of each library in turn."""
    with library(request.param):
        yield native


class Layer:
    """A linear with random weights as a checkpoint holds them, computed by the oracle and by some kernels."""

    def __init__(
        self,
        kernels: ModuleType,
        channels: int = 35,
        features: int = 576,
        bits: tuple[int, int] = (4, 4),
        signed: bool = True,
        groups: tuple[int, int, int] = (1, 1, 1),
        transform: tuple[list[torch.Tensor], int] = ([], 0),
    ):
        """Make a layer; groups are those of weights and of activations, and the segments of these."""
        (self.weight_bits, input_bits), (weight_groups, input_groups, segments) = bits, groups
        self.kernels = kernels
        low = -(2 ** (self.weight_bits - 1)) if signed else 0
        codes = torch.randint(low, low + 2**self.weight_bits, (channels, features))
        zeros = torch.randint(0, 2**self.weight_bits, (channels, weight_groups), dtype=torch.uint8)
        reach = torch.maximum(zeros, 15 - zeros) if not signed else torch.full_like(zeros, 8)
        multiplier = 1 + (torch.rand(channels, weight_groups) * (127 // reach)).to(torch.uint8)
        self.weight = PackedWeight(
            pack_codes(codes, self.weight_bits, signed),
            (torch.rand(channels, 1) + 0.5) / features**0.5,
            None if weight_groups == 1 else multiplier,
            None if signed else zeros,
        )
        clip = None if input_bits == 16 else 0.7 + 0.3 * torch.rand(input_groups, 2)
        self.inputs = InputQuant(*transform, clip, input_bits, symmetric=False, segments=segments)
        self.bias: torch.Tensor | None = torch.randn(channels)

    def prepared(self) -> PackedWeight:
        return self.kernels.prepare_linear(self.weight, self.weight_bits, self.inputs.segments)

    def found(self, x: torch.Tensor) -> torch.Tensor:
        matrices = self.kernels.prepare_matrices(self.inputs.matrices, self.inputs.hadamard)
        return self.kernels.linear(x, self.inputs._replace(matrices=matrices), self.prepared(), self.bias)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        return oracles.linear(x, self.inputs, self.weight, self.bias)

    def check(self, x: torch.Tensor) -> None:
        found = self.found(x)
        assert found.dtype == x.dtype
        assert torch.equal(found, self.expected(x))

    def product(self, *x: torch.Tensor | None) -> torch.Tensor:
        """Multiply given values, scales and offsets of activations; return float32 without a bias."""
        if self.kernels is torch_kernels:
            return torch_kernels.quantized_product(QuantizedInput(*x), self.prepared())
        return operations().quantized_linear(*x, *self.prepared(), None, DTYPES[torch.float32])


def _values(tokens: int, features: int, segments: int, num_bits: int) -> oracles.Quantized:
    """Return any values, scales and, of 8 bits, offsets."""
    values = torch.randint(-127 if num_bits == 4 else -128, 128, (tokens, features), dtype=torch.int8)
    offset = torch.randint(-128, 128, (tokens, segments), dtype=torch.int32)
    return values, torch.rand(tokens, segments) + 0.5, offset if num_bits == 8 else None


GROUPS = [(1, 1, 1), (1, 9, 1), (9, 18, 1), (9, 9, 3), (3, 9, 9), (9, 2, 2)]


@pytest.mark.parametrize("rows", [1, 5, 123])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("features", [576, 72 * 7])  # groups of 64 and 56: tiles of 64 features that end in a group
def test_a_linear_has_the_oracles_bits(
    kernels: ModuleType,
    rows: int,
    bits: tuple[int, int],
    signed: bool,
    groups: tuple[int, int, int],
    features: int,
) -> None:
    torch.manual_seed(rows)
    Layer(kernels, 35, features, bits, signed, _possible(groups, bits)).check(torch.randn(rows, features))


def _possible(groups: tuple[int, int, int], bits: tuple[int, int]) -> tuple[int, int, int]:
    """Return the groups that the format admits at these bits: only 4-bit groups share a scale."""
    weights, inputs, segments = groups
    return weights if bits[0] == 4 else 1, {4: inputs, 8: segments, 16: 1}[bits[1]], segments if bits[1] < 16 else 1


@pytest.mark.parametrize("rows", [1, 2, 13, 40])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("features", [3, 126, 577])
def test_features_need_not_be_a_multiple_of_anything(
    kernels: ModuleType, rows: int, bits: tuple[int, int], signed: bool, features: int
) -> None:
    torch.manual_seed(rows)
    if bits[0] == 4:
        features += features % 2  # two codes to a byte
    Layer(kernels, 35, features, bits, signed).check(torch.randn(rows, features))


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("bits", BITS[:4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("groups", GROUPS)
def test_products_of_any_values_and_offsets_have_the_oracles_bits(
    kernels: ModuleType, tokens: int, bits: tuple[int, int], signed: bool, groups: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    layer = Layer(kernels, 35, 576, bits, signed, _possible(groups, bits))
    x = _values(tokens, 576, groups[2], bits[1])
    assert torch.equal(layer.product(*x), oracles.quantized_linear(x, layer.weight, None, torch.float32))


@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize(("zero", "codes"), [(0, 15), (15, 0), (8, 0), (7, 15)])
def test_integer_weights_use_the_whole_range_of_int8(kernels: ModuleType, tokens: int, zero: int, codes: int) -> None:
    layer = Layer(kernels, 32, 1024, signed=False, groups=(16, 1, 1))
    assert layer.weight.zero_point is not None
    assert layer.weight.multiplier is not None
    layer.weight.packed.fill_(17 * codes)
    layer.weight.zero_point.fill_(zero)
    layer.weight.multiplier.fill_(127 // max(zero, 15 - zero))
    for value in (-127, 127):
        x = torch.full((tokens, 1024), value, dtype=torch.int8), torch.ones(tokens, 1), None
        assert torch.equal(layer.product(*x), oracles.quantized_linear(x, layer.weight, None, torch.float32))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 16, 17, 25, 32, 33, 49, 60, 61, 300])
@pytest.mark.parametrize(("channels", "features"), [(16, 64), (129, 2), (288, 1536), (35, 8192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_number_of_rows_and_channels_in_any_dtype(
    compiled: ModuleType, rows: int, channels: int, features: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    layer, x = Layer(compiled, channels, features), torch.randn(rows, features).to(dtype)
    layer.check(x)
    layer.bias = None
    layer.check(x)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("num_bits", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transforms_biases_and_rows_that_lie_apart_have_the_oracles_bits(
    kernels: ModuleType, transform: str, num_bits: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = Layer(kernels, bits=(4, num_bits), groups=(9, 1, 1), transform=TRANSFORMS[transform])
    layer.bias = torch.randn(35).to(dtype)
    layer.check(torch.randn(7, 2 * 576).to(dtype)[:, 576:])


def test_int16_activations_lose_less_than_bf16() -> None:
    torch.manual_seed(0)
    layer, x = Layer(torch_kernels, 577, bits=(4, 16)), torch.randn(50, 576)
    weight = unpack_codes(layer.weight.packed, 4, signed=True) * layer.weight.scale
    exact = x.double() @ weight.double().T + layer.bias
    error = (layer.found(x) - exact).norm() / exact.norm()
    in_bf16 = (x.bfloat16().double() @ weight.double().T + layer.bias - exact).norm() / exact.norm()
    assert error < in_bf16 / 30


def test_a_missing_base_matrix_and_other_dtypes_are_refused(compiled: ModuleType) -> None:
    layer = Layer(compiled)
    with pytest.raises(RuntimeError, match="base matrix"):
        compiled.linear(torch.randn(1, 576), layer.inputs._replace(hadamard=576), layer.prepared(), None)
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        compiled.linear(torch.randn(1, 576).double(), layer.inputs, layer.prepared(), None)


@pytest.mark.parametrize("features", [576, 126])
def test_rows_of_a_prepared_weight_are_the_checkpoints(kernels: ModuleType, features: int) -> None:
    packed = torch.randint(0, 256, (500, features), dtype=torch.uint8)
    rows = torch.tensor([[0, 499, 16], [31, 32, 77]])
    weight = kernels.prepare_linear(PackedWeight(packed, torch.ones(500, 1), None, None), 8, 1)
    found = kernels.weight_rows(weight.packed, rows, features)
    assert torch.equal(found, packed.view(torch.int8)[rows])


@pytest.mark.parametrize("groups", [(1, 1, 1), (9, 18, 1), (9, 9, 9)])
@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (4, 16)])
def test_a_row_is_the_same_bits_in_any_batch_on_any_number_of_threads(
    kernels: ModuleType, groups: tuple[int, int, int], bits: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    layer, x = Layer(kernels, 300, bits=bits, groups=_possible(groups, bits)), torch.randn(123, 576)
    threads = torch.get_num_threads()
    whole = layer.found(x)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 5, 16, 64, 123):
                assert torch.equal(layer.found(x[:rows]), whole[:rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tokens", [1, 13])
def test_the_largest_sums_that_the_format_admits_are_exact(kernels: ModuleType, tokens: int) -> None:
    for bits, features, value, weight_code in (
        ((4, 8), 32764, 127, 0),
        ((8, 8), 32764, 127, 0),
        ((4, 4), 65536, -15, 15),
    ):
        layer = Layer(kernels, 32, features, bits, signed=False)
        layer.weight.packed.fill_(weight_code * 17)
        assert layer.weight.zero_point is not None
        layer.weight.zero_point.fill_(0 if weight_code else 2 ** bits[0] - 1)
        values = torch.full((tokens, features), value, dtype=torch.int8)
        offset = torch.full((tokens, 1), -128, dtype=torch.int32) if bits[1] == 8 else None
        x = values, torch.ones(tokens, 1), offset
        assert torch.equal(layer.product(*x), oracles.quantized_linear(x, layer.weight, None, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_scales_give_nan_and_too_large_products_infinity(compiled: ModuleType, dtype: torch.dtype) -> None:
    layer = Layer(compiled, 40)
    x = torch.randint(0, 16, (2, 576), dtype=torch.int8), torch.tensor([[torch.nan], [1e36]]), None
    found = operations().quantized_linear(*x, *layer.prepared(), layer.bias, DTYPES[dtype])
    assert found[0].isnan().all()
    assert torch.equal(found[1], oracles.quantized_linear(x, layer.weight, layer.bias, dtype)[1])


@pytest.mark.parametrize(("bits", "channels"), [(4, 576), (8, 576), (4, 1000)])
def test_prepared_weights_take_the_checkpoints_bytes_but_for_padding(
    kernels: ModuleType, bits: int, channels: int
) -> None:
    packed = torch.randint(0, 256, (channels, 576 * bits // 8), dtype=torch.uint8)
    padded = channels if kernels is torch_kernels else -(-channels // 32) * 32
    weight = kernels.prepare_linear(PackedWeight(packed, torch.ones(channels, 1), None, None), bits, 1)
    assert weight.packed.nbytes == packed.nbytes // channels * padded


def test_a_linear_in_inference_mode_leaves_later_ones_outside_of_it_alone() -> None:
    with torch.inference_mode():
        Layer(torch_kernels, 4000).check(torch.randn(1, 576))  # as no other test, so that the buffer is made here
    Layer(torch_kernels).check(torch.randn(1, 576))
