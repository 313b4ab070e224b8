"""The chunked KL of two heads is the plain one."""

import torch

from offline.algorithms.head_kl import kl_of_heads, kl_to, log_probabilities


def test_the_loss_is_the_divergence_over_the_whole_vocabulary_with_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs, head = (torch.randn(*size, generator=generator) for size in ((300, 16), (300, 16), (50, 16)))
    ours.requires_grad_()
    found = kl_of_heads(ours, theirs, head)
    (to_ours,) = torch.autograd.grad(found, ours)
    logits, expected = ours @ head.T, (theirs @ head.T).log_softmax(-1)
    plain = torch.nn.functional.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(to_ours, torch.autograd.grad(plain, ours)[0], rtol=1e-4, atol=1e-7)


def test_the_divergence_to_kept_predictions_is_the_loss_of_scaled_heads() -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs, head = (torch.randn(*size, generator=generator) for size in ((150, 16), (150, 16), (50, 16)))
    found = kl_to(log_probabilities(theirs, head, 4.0), ours, head, 4.0)
    torch.testing.assert_close(torch.tensor(found), kl_of_heads(ours, theirs, head / 4))
