"""A NaN stays NaN, whatever its payload, through every compiled operation that stores bfloat16 or float16."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from infoquant_vllm.format import kv_bytes_per_token_head
from infoquant_vllm.kernels.cpu.kernels import prepare_linear
from infoquant_vllm.kernels.cpu.library import DTYPES, operations
from infoquant_vllm.kernels.operands import PackedWeight
from tests.common.libraries import RUNNABLE, library


@pytest.fixture(scope="module", params=RUNNABLE)
def compiled(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The operations of each library in turn."""
    with library(request.param):
        yield operations()


def _nans(dtype: torch.dtype) -> torch.Tensor:
    """Every NaN of a 16-bit dtype."""
    values = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    return values[values.isnan()]


def _float32_nans() -> torch.Tensor:
    """NaNs of every sign and upper 16 bits, with lower bits that round down, tie, round up and carry."""
    upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    bits = (upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    values = torch.where(bits < 1 << 31, bits, bits - (1 << 32)).int().view(torch.float32)
    return values[values.isnan()]


def _rms_norm(ops: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    nans = _nans(dtype)
    return [ops.rms_norm(torch.ones(3, len(nans), dtype=dtype), nans, 1e-5)]


def _add_rms_norm(ops: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    nans = _nans(dtype)[None]
    return list(ops.add_rms_norm(nans, torch.ones_like(nans), torch.ones_like(nans[0]), 1e-5))


def _silu_and_mul(ops: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    nans, ones = _nans(dtype), torch.ones_like(_nans(dtype))
    return [ops.silu_and_mul(torch.cat(pair)[None]) for pair in ((nans, ones), (ones, nans))]


def _rotary_embedding(ops: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    heads = _nans(dtype).repeat_interleave(64)[None]
    angles = torch.ones(1, 32, dtype=dtype)
    return list(ops.rotary_embedding(torch.zeros(1, dtype=torch.int64), heads, heads, angles, 64))


def _rotate_rows(ops: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        ops.rotate_rows(torch.ones(2, 64, dtype=dtype), torch.ones(64, 64), gain.contiguous())
        for gain in _float32_nans()[::7].unfold(0, 64, 64)
    ]


def _few_rows_linear(ops: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    weight = _nans(dtype)[:, None].expand(-1, 40)
    return [ops.few_rows_linear(torch.ones(rows, 40, dtype=dtype), weight) for rows in (1, 3)]


def _quantized_linears(ops: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    bias = _float32_nans()
    given = PackedWeight(torch.zeros(len(bias), 4, dtype=torch.uint8), torch.ones(len(bias), 1), None, None)
    weight, clip, results = prepare_linear(given, 4, 1), torch.ones(1, 2), []
    for rows in (1, 20):
        x = torch.ones(rows, 8, dtype=dtype)
        quantized = ops.rotate_quantize(x, [], 0, clip, 4, False, 1, None)
        results += [
            ops.linear(x, [], 0, clip, 4, False, 1, None, *weight, bias),
            ops.linear(x, [], 0, None, 16, False, 1, None, *weight, bias),
            ops.quantized_linear(*quantized, *weight, bias, DTYPES[dtype]),
        ]
    return results


def _kv_attention(ops: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """The value zeros of the cache, which are float16, are the NaNs; one sequence of one token for each."""
    nans, results = _nans(torch.float16), []
    for heads in (1, 16):
        cache = torch.zeros(len(nans), 1, 16, kv_bytes_per_token_head(64, (4, 4)), dtype=torch.uint8)
        cache.view(len(nans), -1)[:, -32:] = nans.view(torch.uint8).view(-1, 2).repeat(1, 16)
        query = torch.ones(len(nans), heads, 64, dtype=dtype)
        starts = torch.arange(len(nans) + 1, dtype=torch.int32)
        tables = torch.ones(len(nans), dtype=torch.int32), starts[:-1, None]
        out = torch.zeros_like(query)
        ops.kv_attention(query, cache, starts, *tables, False, 1.0, 0, 0.0, 4, 4, out)
        results.append(out)
    return results


OPERATIONS = [
    _rms_norm,
    _add_rms_norm,
    _silu_and_mul,
    _rotary_embedding,
    _rotate_rows,
    _few_rows_linear,
    _quantized_linears,
    _kv_attention,
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__[1:])
def test_a_nan_of_any_payload_is_stored_as_nan(
    compiled: Any, operation: Callable[[Any, torch.dtype], list[torch.Tensor]], dtype: torch.dtype
) -> None:
    for result in operation(compiled, dtype):
        assert result.dtype == dtype
        assert result.isnan().all()
