"""The differentiable quantizers give the simulation's values, and the gradients of the same formulae."""

from collections.abc import Callable

import pytest
import torch

from infoquant_vllm.format import ActivationArgs
from offline.algorithms.fake_quantize import fake_quantize, fake_store
from offline.evaluate.simulated import quantize_input, store_and_load


def through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The value of `rounded` with the gradient of x."""
    return x + (rounded - x).detach()


def plain_quantize(x: torch.Tensor, clip: torch.Tensor, num_bits: int, symmetric: bool) -> torch.Tensor:
    """What autograd differentiates in place of `fake_quantize`."""
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
    return ((codes - zero) * scale).flatten(-2)


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


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_fake_quantize_has_the_simulations_values_and_its_formulas_gradients(
    groups: int, num_bits: int, symmetric: bool
) -> None:
    x, clip = inputs(2, 7, 48, clips=groups)
    args = ActivationArgs(num_bits=num_bits, symmetric=symmetric)
    codes, scale = quantize_input(x.flatten(0, 1), args, clip)
    values = codes.unflatten(1, (groups, -1)) * scale[:, :, None]
    assert torch.equal(fake_quantize(x, clip, num_bits, symmetric), values.reshape(x.shape))
    found = gradients(lambda x, clip: fake_quantize(x, clip, num_bits, symmetric), x, clip)
    expected = gradients(lambda x, clip: plain_quantize(x, clip, num_bits, symmetric), x, clip)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_fake_store_has_the_caches_values_and_its_formulas_gradients(num_bits: int) -> None:
    x, clip = inputs(2, 3, 7, 16, clips=3)
    assert torch.equal(fake_store(x, clip, num_bits), store_and_load(x, num_bits, clip))
    found = gradients(lambda x, clip: fake_store(x, clip, num_bits), x, clip)
    expected = gradients(lambda x, clip: plain_store(x, clip, num_bits), x, clip)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_tokens_of_zeros_get_finite_gradients() -> None:
    x = torch.zeros(2, 8)
    for gradient in gradients(lambda x, clip: fake_quantize(x, clip, 4, False), x, torch.ones(1, 2)):
        assert torch.isfinite(gradient).all()
