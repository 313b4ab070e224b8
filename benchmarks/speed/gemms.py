"""GEMMs of a linear layer on random operands, as candidates of `benchmarks.common.interleaved`."""

import torch
from vllm import _custom_ops

from benchmarks.common.interleaved import Candidate, copies
from infoquant_vllm.kernels.cpu.kernels import prepare_linear
from infoquant_vllm.kernels.cpu.library import DTYPES, operations
from infoquant_vllm.kernels.operands import PackedWeight


def int4_linear(tokens: int, features: int, channels: int, num_bits: int, groups: int) -> Candidate:
    """Run our GEMM of 4-bit weights, asymmetric in `groups` or symmetric per row (1), by values of 4 or 8 bits."""
    weights = int4_weights(features, channels, groups)
    values, scale = torch.randint(-15, 16, (tokens, features), dtype=torch.int8), torch.rand(tokens, 1)
    offset = torch.randint(-128, 128, (tokens, 1), dtype=torch.int32) if num_bits == 8 else None
    quantized_linear = operations().quantized_linear
    return lambda i: quantized_linear(values, scale, offset, *weights[i % len(weights)], None, DTYPES[torch.bfloat16])


def int4_weights(features: int, channels: int, groups: int) -> list[PackedWeight]:
    """Make random 4-bit weights, asymmetric in `groups` or symmetric per row (1): more copies than fit into a cache."""
    packed = torch.randint(0, 256, (channels, features // 2), dtype=torch.uint8)
    given = PackedWeight(packed, torch.rand(channels, 1), None, None)
    if groups > 1:
        multiplier, zero = torch.randint(1, 9, (channels, groups)), torch.randint(0, 16, (channels, groups))
        given = given._replace(multiplier=multiplier.to(torch.uint8), zero_point=zero.to(torch.uint8))
    packed, scale, *qparams = prepare_linear(given, 4, 1)

    def copy() -> PackedWeight:
        return PackedWeight(
            packed.clone(), scale.clone(), *(None if each is None else each.clone() for each in qparams)
        )

    return [copy() for _ in copies(packed.nbytes)]


def read_weights(size: int) -> Candidate:
    """Read `size` bytes once: a lower bound for any GEMM with weights of that size."""
    read, data = operations().read, [torch.randint(0, 256, (size,), dtype=torch.uint8) for _ in copies(size)]
    return lambda i: read(data[i % len(data)])


def _int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def torch_int8(tokens: int, features: int, channels: int) -> Candidate:
    """Run torch's int8 GEMM with int32 output."""
    x, weights = _int8(tokens, features), [_int8(channels, features) for _ in copies(channels * features)]
    return lambda i: torch._int_mm(x, weights[i % len(weights)].t())


def vllm_int8(tokens: int, features: int, channels: int) -> Candidate:
    """Run oneDNN's GEMM of vLLM's W8A8 on an input that is already quantized."""
    handlers, out = int8_handlers(features, channels), torch.empty(tokens, channels, dtype=torch.bfloat16)
    x, scale = _int8(tokens, features), torch.rand(tokens, 1)
    return lambda i: _custom_ops.onednn_scaled_mm(handlers[i % len(handlers)], x, out, scale, None, None, None)


def int8_handlers(features: int, channels: int) -> list[_custom_ops.CPUDNNLGEMMHandler]:
    """Make random int8 weights in oneDNN's layout, for bf16 output: more copies than fit into a cache."""
    scales, count = torch.rand(channels, 1), copies(channels * features)
    weights = [_int8(channels, features) for _ in count]
    return [_custom_ops.create_onednn_scaled_mm(w.t(), scales, torch.bfloat16, True, False) for w in weights]


def torch_bf16(tokens: int, features: int, channels: int) -> Candidate:
    """Run torch's bf16 linear."""
    size = 2 * channels * features
    weights = [torch.randn(channels, features, dtype=torch.bfloat16) for _ in copies(size)]
    x = torch.randn(tokens, features, dtype=torch.bfloat16)
    return lambda i: torch.nn.functional.linear(x, weights[i % len(weights)])


def vllm_bf16(tokens: int, features: int, channels: int) -> Candidate:
    """Run oneDNN's GEMM of vLLM's unquantized linears."""
    handlers, x = bf16_handlers(features, channels), torch.randn(tokens, features, dtype=torch.bfloat16)
    return lambda i: _custom_ops.onednn_mm(handlers[i % len(handlers)], x, None)


def bf16_handlers(features: int, channels: int) -> list[_custom_ops.CPUDNNLGEMMHandler]:
    """Make random bf16 weights in oneDNN's layout: more copies than fit into a cache."""
    weights = [torch.randn(channels, features, dtype=torch.bfloat16) for _ in copies(2 * channels * features)]
    return [_custom_ops.create_onednn_mm(weight.t(), 32) for weight in weights]


def vllm_w4a8(tokens: int, features: int, channels: int) -> Candidate:
    """Run vLLM's W4A8 for CPUs with AMX; it quantizes its bf16 input."""
    weights, x = w4a8_weights(features, channels, 128), torch.randn(tokens, features, dtype=torch.bfloat16)
    return lambda i: _custom_ops.int4_scaled_mm_cpu(x, *weights[i % len(weights)], None)


def w4a8_weights(features: int, channels: int, group: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Make random 4-bit weights, zero-points and scales in its layout: more copies than fit into a cache."""

    def weight() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = torch.randint(-(2**31), 2**31, (features, channels // 8), dtype=torch.int32)
        zeros = torch.full((features // group, channels // 8), -2004318072, dtype=torch.int32)  # eight times 8
        scales = torch.rand(features // group, channels, dtype=torch.bfloat16)
        return _custom_ops.convert_weight_packed_scale_zp(codes, zeros, scales, _custom_ops.CPUQuantAlgo.AWQ)

    return [weight() for _ in copies(channels * features // 2)]
