"""The torch kernels of a linear layer against the oracles, bit by bit."""

import pytest
import torch

from infoquant_vllm.format import pack_codes, unpack_codes
from infoquant_vllm.kernels.torch.linear import linear, prepare_weight, quantized_product
from infoquant_vllm.kernels.torch.quantize import apply_transform, rotate_quantize
from tests.common import oracles

ROWS = [1, 5, 123]


def _orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(shape))[0].contiguous()


def _transform(kind: str, features: int) -> tuple[list[torch.Tensor], int]:
    """Matrices, and the size of a Hadamard."""
    if kind == "hadamard":
        return [], features
    if kind == "hadamard blocks":
        return [], 32
    if kind == "blocks":
        return [_orthogonal(features // 32, 32, 32)], 0
    if kind == "kronecker":
        return [_orthogonal(features // 32, features // 32), _orthogonal(32, 32)], 0
    return [], 0


@pytest.mark.parametrize("kind", ["none", "hadamard", "hadamard blocks", "blocks", "kronecker"])
@pytest.mark.parametrize("features", [96, 576, 1376])
def test_a_rotated_row_is_right_and_the_same_bits_in_any_batch(kind: str, features: int) -> None:
    torch.manual_seed(0)
    transform, x = _transform(kind, features), torch.randn(123, features)
    rotated = apply_transform(x, *transform)
    for rows in (1, 2, 3, 5, 16, 64):
        assert torch.equal(apply_transform(x[:rows], *transform), rotated[:rows])
    if kind == "none":
        assert torch.equal(rotated, x)
    else:
        torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("num_bits", "symmetric"), [(4, False), (4, True), (8, False), (8, True)])
@pytest.mark.parametrize("groups", [1, 9])
@pytest.mark.parametrize("kind", ["none", "hadamard", "blocks", "kronecker"])
def test_quantized_activations_are_those_of_the_reference(
    rows: int, num_bits: int, symmetric: bool, groups: int, kind: str
) -> None:
    torch.manual_seed(rows)
    transform, x = _transform(kind, 576), torch.randn(rows, 576, dtype=torch.bfloat16)
    clip = 0.7 + 0.3 * torch.rand(groups, 2)
    found = rotate_quantize(x, *transform, clip, num_bits, symmetric)
    expected = oracles.rotate_quantize(x, *transform, clip, num_bits, symmetric)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_all_zero_row_and_a_one_sided_row_are_quantized() -> None:
    x = torch.stack((torch.zeros(64), torch.rand(64) + 1, -torch.rand(64) - 1))
    codes, scale, zero = rotate_quantize(x, [], 0, torch.ones(1, 2), 4, False)
    assert zero.flatten().tolist() == [0, 0, 15]
    value = (codes.int() - zero) * scale
    assert torch.equal(value[0], x[0])
    assert ((value - x).abs() <= scale / 2 * 1.001).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("weight_bits", "signed"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(("groups", "weight_groups"), [(1, 1), (9, 1), (1, 9), (9, 9), (18, 9), (3, 9)])
@pytest.mark.parametrize("features", [576, 126])
def test_products_are_those_of_the_reference(
    rows: int, weight_bits: int, signed: bool, num_bits: int, groups: int, weight_groups: int, features: int
) -> None:
    torch.manual_seed(rows)
    low = -(2 ** (weight_bits - 1)) if signed else 0
    packed = pack_codes(torch.randint(low, low + 2**weight_bits, (35, features)), weight_bits, signed)
    weight_scale = torch.rand(35, weight_groups) + 0.5
    weight_zero = None if signed else torch.randint(0, 2**weight_bits, (35, weight_groups), dtype=torch.uint8)
    codes = torch.randint(0, 2**num_bits, (rows, features), dtype=torch.uint8)
    scale = torch.rand(rows, groups) + 0.5
    zero = torch.randint(0, 2**num_bits, (rows, groups), dtype=torch.int32)
    expected = oracles.quantized_linear(codes, scale, zero, packed, weight_scale, weight_zero, None, torch.float32)
    weight = prepare_weight(packed, weight_bits, signed)
    assert weight.nbytes == packed.nbytes
    found = quantized_product(codes, scale, zero, num_bits, weight, weight_scale, weight_zero)
    assert torch.equal(found, expected)
    ones = torch.ones_like(scale), torch.ones_like(weight_scale)
    exact = quantized_product(codes, ones[0], zero, num_bits, weight, ones[1], weight_zero)
    expected = oracles.quantized_linear(codes, ones[0], zero, packed, ones[1], weight_zero, None, torch.float32)
    assert torch.equal(exact, expected)  # below 2^24 float32 holds integers exactly


@pytest.mark.parametrize("groups", [1, 9])
def test_a_row_of_a_product_is_the_same_bits_in_any_batch(groups: int) -> None:
    torch.manual_seed(0)
    weight = prepare_weight(torch.randint(0, 256, (64, 288), dtype=torch.uint8), 4, True)
    codes = torch.randint(0, 16, (123, 576), dtype=torch.uint8)
    scale, zero = torch.rand(123, groups), torch.randint(0, 16, (123, groups), dtype=torch.int32)
    args = (4, weight, torch.rand(64, 1), None)
    whole = quantized_product(codes, scale, zero, *args)
    for rows in (1, 2, 5, 8, 64):
        assert torch.equal(quantized_product(codes[:rows], scale[:rows], zero[:rows], *args), whole[:rows])


class WeightOnly:
    """Random weights as a checkpoint holds them, and their product by the reference and by the CPU kernel."""

    def __init__(self, rows: int, features: int, num_bits: int, signed: bool, groups: int):
        low = -(2 ** (num_bits - 1)) if signed else 0
        self.packed = pack_codes(torch.randint(low, low + 2**num_bits, (rows, features)), num_bits, signed)
        self.weight = prepare_weight(self.packed, num_bits, signed)
        self.scale = (torch.rand(rows, groups) + 0.5) / features**0.5
        self.zero = None if signed else torch.randint(0, 2**num_bits, (rows, groups), dtype=torch.uint8)
        self.bias = torch.randn(rows)

    def expected(self, x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int) -> torch.Tensor:
        return oracles.linear_int16(x, matrices, hadamard, self.packed, self.scale, self.zero, self.bias)

    def found(self, x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int) -> torch.Tensor:
        return linear(x, matrices, hadamard, None, 16, False, self.weight, self.scale, self.zero, self.bias)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("num_bits", "signed"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("groups", [1, 9])
@pytest.mark.parametrize("features", [576, 126])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only_products_are_those_of_the_reference(
    rows: int, num_bits: int, signed: bool, groups: int, features: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(rows)
    layer, x = WeightOnly(577, features, num_bits, signed, groups), torch.randn(rows, features).to(dtype)
    found, expected = layer.found(x, [], 0), layer.expected(x, [], 0)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["hadamard", "hadamard blocks", "blocks", "kronecker"])
def test_a_weight_only_input_is_rotated(kind: str) -> None:
    torch.manual_seed(0)
    transform, layer = _transform(kind, 576), WeightOnly(35, 576, 4, True, 1)
    for x in (torch.randn(123, 576), torch.randn(123, 576).bfloat16()):
        assert torch.equal(layer.found(x, *transform), layer.expected(x, *transform))
    rotated = apply_transform(x.float(), *transform)
    torch.testing.assert_close(layer.found(x, *transform), layer.expected(rotated, [], 0).bfloat16())


def test_16_bit_codes_are_as_good_as_bf16() -> None:
    torch.manual_seed(0)
    layer, x = WeightOnly(577, 576, 4, True, 1), torch.randn(50, 576)
    weight = unpack_codes(layer.packed, 4, signed=True) * layer.scale
    exact = x.double() @ weight.double().T + layer.bias
    error = (layer.found(x, [], 0) - exact).norm() / exact.norm()
    in_bf16 = (x.bfloat16().double() @ weight.double().T + layer.bias - exact).norm() / exact.norm()
    assert error < in_bf16 / 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "features", "groups"), [(1027, 576, 1), (35, 126, 9), (577, 1536, 12), (3, 2, 1)])
def test_a_row_of_a_weight_only_product_is_the_same_bits_in_any_batch(
    rows: int, features: int, groups: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = WeightOnly(rows, features, 4, False, groups)
    x = torch.randn(123, features).to(dtype)
    whole = layer.found(x, [], 0)
    for tokens in range(1, 41):
        assert torch.equal(layer.found(x[:tokens], [], 0), whole[:tokens])
