"""The chunked KL of two heads is the plain one."""

import pytest
import torch

from offline.algorithms.head_kl import Head, kl_of_heads, kl_to, log_probabilities


@pytest.mark.parametrize(("scaling", "soft_cap"), [(1.0, None), (2.0, None), (1.0, 3.0), (0.5, 3.0)])
def test_the_loss_is_the_divergence_over_the_whole_vocabulary_with_its_gradient(
    scaling: float, soft_cap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs, weight = (torch.randn(*size, generator=generator) for size in ((300, 16), (300, 16), (50, 16)))
    ours.requires_grad_()
    head = Head(weight, scaling, soft_cap)
    found = kl_of_heads(ours, theirs, head)
    (to_ours,) = torch.autograd.grad(found, ours)
    logits, targets = (x @ weight.T / scaling for x in (ours, theirs))
    if soft_cap is not None:
        logits, targets = (soft_cap * (x / soft_cap).tanh() for x in (logits, targets))
    expected = targets.log_softmax(-1)
    plain = torch.nn.functional.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(to_ours, torch.autograd.grad(plain, ours)[0], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(log_probabilities(theirs, head), expected)
    assert kl_to(expected, ours.detach(), head) == pytest.approx(plain.item(), rel=1e-4)
