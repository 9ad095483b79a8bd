"""Value and gradient of the KL estimators, by summing over every token."""

import pytest
import torch
from torch import Tensor

from rlmm.objectives.kl import kl_estimate, kl_loss

CODES = 5


def laws(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the policy (with gradient), the reference and an old policy."""
    generator = torch.Generator().manual_seed(seed)
    policy, reference, old = torch.randn(3, CODES, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), reference, old


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) of two laws given by logits."""
    return (a.softmax(0) * (a.log_softmax(0) - b.log_softmax(0))).sum()


def expectation(kind: str, policy: Tensor, reference: Tensor, old: Tensor | None = None) -> Tensor:
    """Mean of the loss over tokens of the sampling law (`old`, else the policy), which carries no
    gradient."""
    sampler = (policy if old is None else old).detach().softmax(0)
    old_logp = None if old is None else old.log_softmax(0)[None]
    loss = kl_loss(kind, policy.log_softmax(0)[None], reference.log_softmax(0)[None], old_logp_BS=old_logp)
    return (sampler * loss[0]).sum()


def gradient(value: Tensor, policy: Tensor) -> Tensor:
    return torch.autograd.grad(value, policy, retain_graph=True)[0]


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_on_policy(kind: str) -> None:
    policy, reference, _ = laws()
    torch.testing.assert_close(expectation(kind, policy, reference), divergence(policy, reference))


def test_k2_is_biased_in_value() -> None:
    policy, reference, _ = laws()
    assert (expectation("k2", policy, reference) - divergence(policy, reference)).abs() > 0.05


def test_k3_is_never_negative() -> None:
    logp = torch.linspace(-8, 0, 101, dtype=torch.float64)[None]
    assert (kl_estimate("k3", logp, torch.full_like(logp, -4)) >= 0).all()
    assert (kl_estimate("k1", logp, torch.full_like(logp, -4)) < 0).any()


def test_k1_as_a_loss_pulls_nowhere() -> None:
    policy, reference, _ = laws()
    found = gradient(expectation("k1", policy, reference), policy)
    torch.testing.assert_close(found, torch.zeros(CODES, dtype=torch.float64), rtol=0, atol=1e-12)
    assert gradient(divergence(policy, reference), policy).abs().max() > 0.05


def test_k2_has_the_gradient_of_the_kl() -> None:
    policy, reference, _ = laws()
    found = gradient(expectation("k2", policy, reference), policy)
    torch.testing.assert_close(found, gradient(divergence(policy, reference), policy), rtol=0, atol=1e-12)


def test_k3_has_the_gradient_of_the_other_kl() -> None:
    policy, reference, _ = laws()
    found = gradient(expectation("k3", policy, reference), policy)
    torch.testing.assert_close(found, gradient(divergence(reference, policy), policy), rtol=0, atol=1e-12)
    assert (found - gradient(divergence(policy, reference), policy)).abs().max() > 0.05


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_importance_weights_give_value_and_gradient_of_the_kl(kind: str, on_policy: bool) -> None:
    policy, reference, old = laws()
    found = expectation(kind, policy, reference, policy.detach() if on_policy else old)
    exact = divergence(policy, reference)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(gradient(found, policy), gradient(exact, policy), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_without_weights_a_stale_sample_breaks_every_kind(kind: str) -> None:
    policy, reference, old = laws()
    loss = kl_loss(kind, policy.log_softmax(0)[None], reference.log_softmax(0)[None])
    found = gradient((old.softmax(0) * loss[0]).sum(), policy)
    for exact in (divergence(policy, reference), divergence(reference, policy)):
        assert (found - gradient(exact, policy)).abs().max() > 0.05


def test_k2_over_several_tokens_leaves_out_the_prefix() -> None:
    """Two tokens: k2 summed over them has the gradient of the token KLs under a fixed prefix law, not of the
    sequence KL, whose first token also answers for the KL of the second."""
    generator = torch.Generator().manual_seed(1)
    first, second, ref_first, ref_second = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(3,), (3, 3), (3,), (3, 3)]
    )
    first.requires_grad_()
    logp = torch.stack([first.log_softmax(0)[:, None].expand(3, 3), second.log_softmax(1)], -1).reshape(9, 2)
    reference = torch.stack([ref_first.log_softmax(0)[:, None].expand(3, 3), ref_second.log_softmax(1)], -1)
    probability = logp.sum(1).exp()
    loss = kl_loss("k2", logp, reference.reshape(9, 2)).sum(1)
    found = gradient((probability.detach() * loss).sum(), first)
    torch.testing.assert_close(found, gradient(divergence(first, ref_first), first), rtol=0, atol=1e-12)
    sequence_kl = (probability * (logp - reference.reshape(9, 2)).sum(1)).sum()
    assert (found - gradient(sequence_kl, first)).abs().max() > 0.01


def test_positions_outside_the_mask_have_neither_value_nor_gradient() -> None:
    logp = torch.tensor([[-1.0, float("-inf"), -2.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, float("nan"), -1.0]])
    mask = torch.tensor([[True, False, True]])
    for kind in ("k1", "k2", "k3"):
        loss = kl_loss(kind, logp, reference, old_logp_BS=logp.detach(), target_mask_BS=mask)
        assert loss[0, 1] == 0 and loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), logp)[0].isfinite().all()


def test_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'.*k3"):
        kl_estimate("k4", torch.zeros(1, 1), torch.zeros(1, 1))
