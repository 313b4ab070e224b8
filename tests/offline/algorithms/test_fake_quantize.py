"""The differentiable quantizers give the oracles' values, and the gradients of the same formulas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infoquant_vllm.format import ActivationArgs, WeightArgs, activation_groups, kv_bytes_per_token_head, pack_codes
from infoquant_vllm.kernels.operands import KVCalibration, KVScheme
from offline.algorithms.fake_quantize import dequantized_weight, fake_quantize, fake_store, input_quant
from offline.algorithms.rtn import round_to_nearest
from tests.common import oracles


def through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The value of `rounded` with the gradient of x."""
    return x + (rounded - x).detach()


def plain_quantize(x: torch.Tensor, clip: torch.Tensor, args: ActivationArgs) -> torch.Tensor:
    """What autograd differentiates in place of `fake_quantize`."""
    num_bits, symmetric = args.num_bits, args.symmetric
    y = x.unflatten(-1, (len(clip), -1))
    low = y.detach().amin(-1, keepdim=True).clamp(max=0) * clip[:, :1]
    high = y.detach().amax(-1, keepdim=True).clamp(min=0) * clip[:, 1:]
    if symmetric:
        scale = torch.maximum(-low, high) / (2 ** (num_bits - 1) - 1)
        zero = torch.tensor(2.0 ** (num_bits - 1))
    else:
        scale = (high - low) / (2**num_bits - 1)
        zero = torch.round(-low / scale).detach()
    codes = (through(y / scale, torch.round(y / scale)) + zero).clamp(0, 2**num_bits - 1)
    return ((codes - zero) * scale).flatten(-2)  # rounding to the scale that groups share passes gradients


def plain_store(x: torch.Tensor, clip: torch.Tensor, num_bits: int) -> torch.Tensor:
    """What autograd differentiates in place of `fake_store`."""
    low = x.detach().amin(-1, keepdim=True).clamp(max=0) * clip[:, :1, None]
    high = x.detach().amax(-1, keepdim=True).clamp(min=0) * clip[:, 1:, None]
    scale = (high - low) / (2**num_bits - 1)
    scale, low = through(scale, scale.half().float()), through(low, low.half().float())
    codes = (x - low) / scale
    return through(codes, torch.round(codes)).clamp(0, 2**num_bits - 1) * scale + low


def inputs(*shape: int, clips: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with rows of one sign among them, and clips from tight to none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    x[..., 0, :] = x[..., 0, :].abs()
    x[..., 1, :] = -x[..., 1, :].abs()
    clip = 0.5 + 0.5 * torch.rand(clips, 2, generator=generator)
    clip[0] = 1.0
    return x, clip


def gradients(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, clip: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    x, clip = x.clone().requires_grad_(), clip.clone().requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (function(x, clip) * weights).sum().backward()
    assert x.grad is not None
    assert clip.grad is not None
    return x.grad, clip.grad


LAYOUTS: dict[str, dict[str, Any]] = {
    "a4": {"num_bits": 4},
    "a4 in segments": {"num_bits": 4, "segment_size": 16},
    "a4 in groups": {"num_bits": 4, "strategy": "group", "group_size": 8},
    "a4 in segments of groups": {"num_bits": 4, "strategy": "group", "group_size": 8, "segment_size": 24},
    "a8": {"num_bits": 8},
    "a8 in segments": {"num_bits": 8, "segment_size": 16},
}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_quantize_has_the_oracles_values_and_its_formulas_gradients(layout: str, symmetric: bool) -> None:
    args = ActivationArgs(symmetric=symmetric, **LAYOUTS[layout])
    x, clip = inputs(2, 7, 48, clips=activation_groups(args, 48))
    values, scale, offset = oracles.rotate_quantize(x.flatten(0, 1), input_quant(args, clip, 48))
    integers = values.view(*scale.shape, -1) - (0 if offset is None else offset[..., None])
    assert torch.equal(fake_quantize(x, clip, args), (integers * scale[..., None]).view(x.shape))
    found = gradients(lambda x, clip: fake_quantize(x, clip, args), x, clip)
    expected = gradients(lambda x, clip: plain_quantize(x, clip, args), x, clip)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "scheme", [{"num_bits": 4}, {"num_bits": 8}, {"num_bits": 4, "strategy": "group", "group_size": 24}]
)
def test_a_checkpoints_weights_are_those_that_were_rounded(scheme: dict[str, Any], symmetric: bool) -> None:
    args = WeightArgs(symmetric=symmetric, **scheme)
    rounded = round_to_nearest(torch.randn(20, 96, generator=torch.Generator().manual_seed(0)), args)
    tensors = {
        "weight_packed": pack_codes(rounded.codes, args.num_bits, signed=symmetric),
        "weight_scale": rounded.scale,
    }
    if not symmetric:
        tensors["weight_zero_point"] = rounded.zero.to(torch.uint8)
    if args.group_size is not None:
        tensors["weight_multiplier"] = rounded.multiplier.to(torch.uint8)
    torch.testing.assert_close(dequantized_weight(tensors, args), rounded.values(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_fake_store_has_the_gradients_of_its_formulas(num_bits: int) -> None:
    x, clip = inputs(2, 3, 7, 16, clips=3)
    found = gradients(lambda x, clip: fake_store(x, clip, num_bits), x, clip)
    expected = gradients(lambda x, clip: plain_store(x, clip, num_bits), x, clip)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("num_bits", [(4, 4), (8, 8), (8, 4), (4, 8)])
def test_fake_store_has_the_values_that_the_cache_returns(num_bits: tuple[int, int]) -> None:
    generator, tokens = torch.Generator().manual_seed(3), 23
    key, value = torch.randn(2, tokens, 2, 64, generator=generator)
    clips = 0.7 + 0.3 * torch.rand(2, 2, 2, generator=generator)
    cache = torch.zeros(1, 2, 32, kv_bytes_per_token_head(64, num_bits), dtype=torch.uint8)
    feedback = (0.2 * torch.randn(2, 64, 64, generator=generator)).triu(1)
    calibration = KVCalibration(*clips, None, feedback)
    oracles.kv_store(key, value, cache, torch.arange(tokens), calibration, KVScheme(num_bits, False))
    keys, values, params = oracles.kv_read(cache, torch.tensor([0]), 64, num_bits)
    for x, bits, clip, shared, codes, (scale, zero) in (
        (key, num_bits[0], clips[0], feedback, keys, params[:2]),
        (value, num_bits[1], clips[1], None, values, params[2:]),
    ):
        expected = codes * scale.float()[..., None] + zero.float()[..., None]
        assert torch.equal(fake_store(x.transpose(0, 1), clip, bits, shared), expected[:, :tokens])


def test_keys_with_feedback_pass_the_gradient_unless_clipped() -> None:
    x, clip = inputs(2, 3, 7, 16, clips=3)
    feedback = torch.full((3, 16, 16), 0.4).triu(1)
    plain, _ = gradients(lambda x, clip: fake_store(x, clip, 4), x, clip)
    found, _ = gradients(lambda x, clip: fake_store(x, clip, 4, feedback), x, clip)
    values = fake_store(x, clip, 4), fake_store(x, clip, 4, feedback)
    assert not torch.equal(*values)
    torch.testing.assert_close(found, plain)


def test_fake_store_is_finite_beyond_half_precision() -> None:
    huge = torch.full((1, 1, 64), 1e6)
    assert torch.isfinite(fake_store(torch.cat((huge, -huge, 0 * huge), 1), torch.ones(1, 2), 4)).all()


def test_tokens_of_zeros_get_finite_gradients() -> None:
    x = torch.zeros(2, 8)
    for gradient in gradients(lambda x, clip: fake_quantize(x, clip, ActivationArgs(num_bits=4)), x, torch.ones(1, 2)):
        assert torch.isfinite(gradient).all()
