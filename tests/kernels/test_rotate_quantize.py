"""Input transforms, activation quantizers and R1 online, in torch and compiled: the oracle's bits."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from infoquant_vllm.kernels.cpu.kernels import prepare_matrices, rotate_rows
from infoquant_vllm.kernels.cpu.library import operations
from infoquant_vllm.kernels.operands import InputQuant
from infoquant_vllm.kernels.torch import quantize as torch_kernels
from infoquant_vllm.kernels.torch.dense import rotate_rows as torch_rows
from infoquant_vllm.kernels.triton.linear import rotate_rows as gpu_rows
from tests.common import oracles
from tests.common.libraries import RUNNABLE, library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = {  # features, and what they go through: ("hadamard", size), ("blocks", size), ("kronecker", a, b)
    "none": (576, ()),
    "none, odd": (77, ()),
    "hadamard 12 x 128": (1536, ("hadamard", 1536)),
    "hadamard 28 x 64": (1792, ("hadamard", 1792)),
    "hadamard 4096": (4096, ("hadamard", 4096)),
    "hadamard 28 x 512": (14336, ("hadamard", 14336)),
    "hadamard 43 x 4": (344, ("hadamard", 172)),
    "hadamard 12 x 1": (24, ("hadamard", 12)),
    "hadamard of heads": (576, ("hadamard", 64)),
    "blocks of 288": (576, ("blocks", 288)),
    "blocks of 64": (576, ("blocks", 64)),
    "blocks of 7": (35, ("blocks", 7)),
    "kronecker 12 x 128": (1536, ("kronecker", 12, 128)),
    "kronecker 5 x 7": (35, ("kronecker", 5, 7)),
    "kronecker 64 x 64": (4096, ("kronecker", 64, 64)),
}


class Compiled:
    """The operations of the library, called as the functions of kernels/torch/quantize.py."""

    @staticmethod
    def apply_transform(x: torch.Tensor, matrices: list[torch.Tensor], hadamard: int) -> torch.Tensor:
        return operations().rotate(x, prepare_matrices(matrices, hadamard), hadamard)

    @staticmethod
    def rotate_quantize(x: torch.Tensor, inputs: InputQuant) -> Any:
        matrices = prepare_matrices(inputs.matrices, inputs.hadamard)
        return operations().rotate_quantize(x, *inputs._replace(matrices=matrices))


Kernels = ModuleType | type[Compiled]


@pytest.fixture(scope="module", params=["torch", *RUNNABLE])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Yield those in torch, and those of each library in turn."""
    if request.param == "torch":
        yield torch_kernels
        return
    with library(request.param):
        yield Compiled


@pytest.fixture(scope="module", params=RUNNABLE)
def _library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Call each library in turn."""
    with library(request.param):
        yield


def _transform(kind: tuple, features: int) -> tuple[list[torch.Tensor], int]:
    """Return matrices, and the size of a Hadamard."""
    if not kind or kind[0] == "hadamard":
        return [], kind[1] if kind else 0
    if kind[0] == "blocks":
        return [torch.randn(features // kind[1], kind[1], kind[1])], 0
    return [torch.randn(size, size) for size in kind[1:]], 0


def _check(kernels: Kernels, x: torch.Tensor, *args: Any) -> None:
    inputs = InputQuant(*args)
    _assert_equal(kernels.rotate_quantize(x, inputs), oracles.rotate_quantize(x, inputs))


def _assert_equal(found: oracles.Quantized, expected: oracles.Quantized) -> None:
    for one, right in zip(found, expected, strict=True):
        if one is None or right is None:
            assert one is right
            continue
        assert one.dtype == right.dtype
        assert torch.equal(one, right)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transforms_and_codes_have_the_oracles_bits(
    kernels: Kernels, name: str, tokens: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    features, kind = TRANSFORMS[name]
    transform, x = _transform(kind, features), (3 * torch.randn(tokens, features)).to(dtype)
    _check(kernels, x, *transform, 0.7 + 0.3 * torch.rand(1, 2), 4, False)
    _check(kernels, x, *transform, None, 16, False)
    assert torch.equal(kernels.apply_transform(x.float(), *transform), oracles.apply_transform(x.float(), *transform))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("tokens", [0, 1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_inputs_less_their_mean_have_the_oracles_bits(
    kernels: Kernels, name: str, tokens: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    features, kind = TRANSFORMS[name]
    transform, mean, groups = _transform(kind, features), 3 * torch.randn(features), 1 if features % 4 else 2
    x = (mean + torch.randn(tokens, features)).to(dtype)
    for segments in {1, groups}:
        _check(kernels, x, *transform, 0.7 + 0.3 * torch.rand(groups, 2), 4, False, segments, mean)
    _check(kernels, x, *transform, torch.ones(1, 2), 8, False, 1, mean)
    _check(kernels, x, *transform, None, 16, False, 1, mean)


@pytest.mark.parametrize("group_size", [1, 12, 16, 64, 128, 1536])
@pytest.mark.parametrize(("num_bits", "symmetric"), [(4, False), (4, True), (8, False), (8, True)])
def test_segments_and_bits_have_the_oracles_bits(
    kernels: Kernels, group_size: int, num_bits: int, symmetric: bool
) -> None:
    torch.manual_seed(0)
    clip = 0.7 + 0.3 * torch.rand(1536 // group_size, 2)
    for transform in (([], 0), ([], 1536)):
        _check(kernels, torch.randn(5, 1536).bfloat16(), *transform, clip, num_bits, symmetric, len(clip))


@pytest.mark.parametrize("group_size", [1, 4, 12, 16, 32, 64, 256])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("segments", [1, 2])
def test_groups_that_share_a_scale_have_the_oracles_bits(
    kernels: Kernels, group_size: int, symmetric: bool, segments: int
) -> None:
    torch.manual_seed(0)
    clip = 0.7 + 0.3 * torch.rand(1536 // group_size, 2)
    spread = 10 * torch.randn(23, 1536 // group_size).exp().repeat_interleave(group_size, 1)  # of groups' ranges
    for x in (torch.randn(23, 1536), spread * torch.randn(23, 1536), spread * torch.rand(23, 1536)):
        for transform in (([], 0), ([], 64)):
            _check(kernels, x.bfloat16(), *transform, clip, 4, symmetric, segments)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hadamard", [0, 96])
def test_extremes_have_the_oracles_bits(kernels: Kernels, num_bits: int, symmetric: bool, hadamard: int) -> None:
    torch.manual_seed(0)
    outlier = torch.randn(96)
    outlier[17] = 1e6
    halves = torch.arange(96) / 2  # values half way between codes: ties
    rows = [torch.zeros(96), torch.full((96,), 1e30), torch.full((96,), -3.0), torch.rand(96) * 1e-20, outlier, halves]
    for clip in (1.0, 0.5, 0.0):
        for groups in (1, 6, 24) if num_bits == 4 else (1,):
            _check(kernels, torch.stack(rows), [], hadamard, torch.full((groups, 2), clip), num_bits, symmetric)
    _check(kernels, torch.stack(rows), [], hadamard, None, 16, False)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("tokens", [0, 1, 5, 13])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [35, 192, 576])
def test_compiled_online_r1_has_the_oracles_bits(tokens: int, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(tokens)
    rows, rotation, gain = torch.randn(tokens, size).to(dtype), torch.randn(size, size), torch.randn(size)
    for factors in (None, gain):
        found = rotate_rows(rows, rotation, factors)
        assert found.dtype == dtype
        assert torch.equal(found, oracles.rotate_rows(rows, rotation, factors))


@pytest.mark.usefixtures("_library")
def test_compiled_online_r1_gives_a_row_the_same_bits_in_any_batch_by_any_number_of_threads() -> None:
    torch.manual_seed(0)
    rows, rotation, gain = torch.randn(600, 96), torch.randn(96, 96), torch.randn(96)
    expected = oracles.rotate_rows(rows, rotation, gain)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for tokens in (1, 2, 7, 12, 13, 64, 600):
                assert torch.equal(rotate_rows(rows[:tokens], rotation, gain), expected[:tokens])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", [torch_rows, gpu_rows])
@pytest.mark.parametrize("dtype", DTYPES)
def test_online_r1_in_torch_differs_from_the_oracle_by_last_bits(
    kernel: Callable[..., torch.Tensor], dtype: torch.dtype
) -> None:
    """Sums of 576 products in another order differ by some 1e-6, and near a tie by the dtype's last bit."""
    torch.manual_seed(0)
    rows, gain = torch.randn(13, 576).to(dtype), 1 + torch.rand(576)
    rotation = torch.linalg.qr(torch.randn(576, 576))[0]
    for factors in (None, gain):
        found, expected = kernel(rows, rotation, factors), oracles.rotate_rows(rows, rotation, factors)
        assert found.dtype == dtype
        bound = 1e-5 + torch.finfo(dtype).eps * expected.float().abs()
        assert ((found.float() - expected.float()).abs() <= bound).all()
        if dtype != torch.float32:
            assert (found == expected).float().mean() >= 0.98


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_tf32_that_vllm_allows_does_not_change_online_r1(precision: str) -> None:
    torch.manual_seed(0)
    rows, rotation = torch.randn(64, 576), torch.randn(576, 576)
    expected = gpu_rows(rows, rotation, None)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(gpu_rows(rows, rotation, None), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["hadamard 12 x 128", "blocks of 288", "kronecker 12 x 128"])
def test_a_row_is_the_same_bits_in_any_batch_by_any_number_of_threads(kernels: Kernels, name: str) -> None:
    torch.manual_seed(0)
    features, kind = TRANSFORMS[name]
    transform, x = _transform(kind, features), torch.randn(123, features).bfloat16()
    inputs = InputQuant(*transform, torch.ones(features // 64, 2), 4, False)
    before = torch.get_num_threads()
    whole = kernels.rotate_quantize(x, inputs)[:2]
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for rows in (1, 2, 7, 64, 123):
                for found, expected in zip(kernels.rotate_quantize(x[:rows], inputs)[:2], whole, strict=True):
                    assert torch.equal(found, expected[:rows])
    finally:
        torch.set_num_threads(before)


def test_rows_need_not_be_contiguous(kernels: Kernels) -> None:
    torch.manual_seed(0)
    x, inputs = torch.randn(7, 256).bfloat16(), InputQuant([], 128, torch.ones(1, 2), 4, False)
    found = kernels.rotate_quantize(x[:, 64:192], inputs)
    _assert_equal(found, kernels.rotate_quantize(x[:, 64:192].contiguous(), inputs))
