"""RMSNorm, the products of gated MLPs and RoPE: the compiled kernels against those in torch, both against vLLM's."""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from vllm import _custom_ops

from infoquant_vllm.kernels.cpu import kernels as compiled
from infoquant_vllm.kernels.torch import elementwise as torch_kernels
from tests.common.libraries import RUNNABLE, library

PRODUCTS = ["silu_and_mul", "gelu_tanh_and_mul"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT_WEIGHTS = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
SHAPES = [(1, 576), (5, 64), (3, 7, 128), (2, 35), (33, 4096), (0, 64)]


@pytest.fixture(scope="module", params=RUNNABLE)
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Yield those of each library in turn."""
    with library(request.param):
        yield compiled


def _assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, but for one value in a hundred thousand that differs in its last."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found != expected).sum() <= found.numel() / 1e5
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "of_weight"), [*zip(DTYPES, DTYPES, strict=True), *FLOAT_WEIGHTS])
def test_norms_are_those_in_torch(
    kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, of_weight: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, residual = (3 * torch.randn(2, *shape)).to(dtype)
    weight = torch.randn(shape[-1]).to(of_weight)
    _assert_equal(kernels.rms_norm(x, weight, 1e-5), torch_kernels.rms_norm(x, weight, 1e-5))
    expected = torch_kernels.add_rms_norm(x, residual, weight, 1e-5)
    for found, right in zip(kernels.add_rms_norm(x, residual, weight, 1e-5), expected, strict=True):
        _assert_equal(found, right)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_gated_products_are_those_in_torch(
    kernels: ModuleType, product: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = (10 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype)
    _assert_equal(getattr(kernels, product)(x), getattr(torch_kernels, product)(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_gate_of_16_bits_is_that_in_torch(kernels: ModuleType, product: str, dtype: torch.dtype) -> None:
    gates = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    x = torch.cat((gates, torch.ones_like(gates)))[None]
    found, expected = getattr(kernels, product)(x), getattr(torch_kernels, product)(x)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("product", PRODUCTS)
def test_extreme_gates_are_those_in_torch(kernels: ModuleType, product: str) -> None:
    gates = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 700.0, -700.0, 1e30, -1e4, torch.inf, torch.nan, 1.0])
    x = torch.cat((gates, torch.ones_like(gates)))[None]
    found, expected = getattr(kernels, product)(x), getattr(torch_kernels, product)(x)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


def test_zeros_and_large_values_have_norms(kernels: ModuleType) -> None:
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e30), torch.full((64,), -1e-30)))
    found = kernels.rms_norm(x, torch.ones(64), 1e-6)
    assert torch.equal(found[0], torch.zeros(64))
    torch.testing.assert_close(found[1], torch.ones(64))
    assert torch.equal(found, torch_kernels.rms_norm(x, torch.ones(64), 1e-6))


def test_rows_that_lie_apart_are_read_right(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    wide = torch.randn(6, 256)
    _assert_equal(
        kernels.rms_norm(wide[:, :64], torch.ones(64), 1e-5), torch_kernels.rms_norm(wide[:, :64], torch.ones(64), 1e-5)
    )
    _assert_equal(kernels.silu_and_mul(wide[:, 128:]), torch_kernels.silu_and_mul(wide[:, 128:]))


def test_a_row_is_the_same_bits_in_any_batch(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(123, 576).bfloat16(), torch.randn(576).bfloat16()
    calls: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda rows: kernels.rms_norm(rows, weight, 1e-5),
        kernels.silu_and_mul,
    ]
    for call in calls:
        whole = call(x)
        for rows in (1, 2, 7, 64):
            assert torch.equal(call(x[:rows]), whole[:rows])


def test_norms_and_gated_products_are_those_of_torchs_functions_but_for_last_bits() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 1152), torch.randn(1152)
    torch.testing.assert_close(torch_kernels.rms_norm(x, weight, 1e-5), F.rms_norm(x, (1152,), weight, 1e-5))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(torch_kernels.silu_and_mul(x), F.silu(gate) * up)
    torch.testing.assert_close(torch_kernels.gelu_tanh_and_mul(x), F.gelu(gate, approximate="tanh") * up)


@pytest.mark.parametrize(("head_size", "rotary_dim"), [(64, 64), (128, 128), (96, 96), (80, 20), (10, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_is_that_in_torch(kernels: ModuleType, dtype: torch.dtype, head_size: int, rotary_dim: int) -> None:
    torch.manual_seed(0)
    angles = 100 * torch.rand(50, rotary_dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    for tokens in (0, 1, 5, 123):
        wide = torch.randn(tokens, 5 * head_size).to(dtype)
        query, key = wide[:, : 3 * head_size], wide[:, 3 * head_size :]
        positions = torch.randint(0, 50, (tokens,))
        expected = torch_kernels.rotary_embedding(positions, query, key, cos_sin, head_size)
        for found, right in zip(
            kernels.rotary_embedding(positions, query, key, cos_sin, head_size), expected, strict=True
        ):
            _assert_equal(found, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_is_that_of_vllm(kernels: ModuleType, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angles = 100 * torch.rand(50, 32)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1).to(dtype)
    query, key, positions = *torch.randn(2, 50, 192).to(dtype), torch.randperm(50)
    found = kernels.rotary_embedding(positions, query, key, cos_sin, 64)
    _custom_ops.rotary_embedding(positions, query, key, 64, cos_sin, True)
    assert torch.equal(found[0], query)
    assert torch.equal(found[1], key)
