"""The KL penalty between two real models against the exact divergence, by summing over every prefix and next code.

A token's divergence KL(policy || reference) at a prefix, averaged over the prefixes of the sampling law, summed over
positions and prompts. Everything passes through `CausalPolicy.log_probs` and `grpo_loss` under guided and cut laws.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlmm.policies.causal import CausalPolicy
from rlmm.train.grpo import GrpoBatch
from rollouts.law import Law
from tests.exact.enumerable import (
    PROMPTS,
    Table,
    assert_same,
    decisions,
    every_image,
    gradient,
    law_named,
    make_policy,
    perturbed,
    table,
)
from tests.exact.expected_step import loss, stage

LAWS = ["plain", "guidance, temperature", "two scales, top-k, top-p", "top-p"]


@dataclass(frozen=True)
class Setting:
    """A policy, its reference, and the policy that the images are drawn from (the policy itself on policy)."""

    law: Law
    policy: CausalPolicy
    reference: CausalPolicy
    sampler: CausalPolicy

    def tables(self, prompt: str) -> tuple[Table, Table, Table]:
        """Of policy, reference and sampler over the sampler's support."""
        sampler = table(self.sampler, self.law, prompt)
        support = sampler.support_NSV
        return (
            table(self.policy, self.law, prompt, support_NSV=support),
            table(self.reference, self.law, prompt, support_NSV=support),
            sampler,
        )

    def divergence(self, *, reverse: bool = False) -> Tensor:
        """The exact sum of token divergences, with the policy's gradient; `reverse` is KL(reference || policy)."""
        total = torch.zeros((), dtype=torch.float64)
        for prompt in PROMPTS:
            policy, reference, sampler = self.tables(prompt)
            for at in decisions(sampler, torch.zeros(len(sampler.logp_NSV), dtype=torch.float64)):
                p, q = at.logp(policy), at.logp(reference).detach()
                total = total + (at.prefix_M * (q.exp() * (q - p) if reverse else p.exp() * (p - q))).sum()
        return total

    def penalty(self, kind: str, *, weighted: bool = False) -> Tensor:
        """Expected penalty of an image, summed over prompts, as the stage computes it."""
        every = every_image(self.sampler, self.law)
        config = stage({"name": "rloo", "kl": {"kind": kind, "coefficient": 1, "importance_weighted": weighted}})
        with torch.no_grad():
            reference_BS = self.reference.log_probs(every).logp_BS
        count = len(every)
        batch = GrpoBatch(
            every,
            torch.zeros(count),
            torch.ones(count, dtype=torch.bool),
            every.sampler_logp.sum(1).exp()[:, None].expand(-1, every.ids.shape[1]),
            gate=self.sampler is self.policy,
            old_logp_BS=None if self.sampler is self.policy else every.sampler_logp,
            reference_logp_BS=reference_BS,
        )
        return loss(self.policy, config, batch)


def setting(name: str, *, on_policy: bool = True) -> Setting:
    policy = make_policy()
    sampler = policy if on_policy else perturbed(policy, scale=0.1, seed=2)
    return Setting(law_named(name, policy), policy, perturbed(policy, scale=0.15), sampler)


@pytest.mark.parametrize("name", LAWS)
def test_the_token_divergences_sum_to_that_of_whole_images(name: str) -> None:
    """The chain rule, on policy: the exact value the others are compared with is the KL of the image laws."""
    found, total = setting(name), torch.zeros((), dtype=torch.float64)
    for prompt in PROMPTS:
        policy, reference, _ = found.tables(prompt)
        p, q = policy.probability()[policy.possible()], reference.probability()[policy.possible()]
        total = total + (p * (p / q).log()).sum()
    assert_same(found.divergence(), total)
    assert total > 0.05


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("name", LAWS)
def test_k1_and_k3_have_the_exact_value(name: str, kind: str) -> None:
    # On policy the weight of k1 is 1: its value is the plain estimator's, whose use as a loss the config refuses.
    found = setting(name)
    assert_same(found.penalty(kind, weighted=kind == "k1"), found.divergence())


@pytest.mark.parametrize("name", LAWS)
def test_k2_has_the_gradient_of_the_divergence_and_another_value(name: str) -> None:
    found = setting(name)
    penalty = found.penalty("k2")
    assert_same(gradient(found.policy, penalty), gradient(found.policy, found.divergence()))
    assert (penalty - found.divergence()).abs() > 1e-3 * found.divergence()


@pytest.mark.parametrize("name", LAWS)
def test_k3_has_the_gradient_of_the_reverse_divergence(name: str) -> None:
    found = setting(name)
    pulled = gradient(found.policy, found.penalty("k3"))
    assert_same(pulled, gradient(found.policy, found.divergence(reverse=True)))
    assert torch.cosine_similarity(pulled, gradient(found.policy, found.divergence()), dim=0) < 0.9999


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("name", LAWS)
def test_importance_weights_give_value_and_gradient(name: str, kind: str, on_policy: bool) -> None:
    found = setting(name, on_policy=on_policy)
    penalty, exact = found.penalty(kind, weighted=True), found.divergence()
    assert_same(penalty, exact)
    assert_same(gradient(found.policy, penalty), gradient(found.policy, exact))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_a_stale_sample_without_weights_has_neither_gradient(kind: str) -> None:
    found = setting("guidance, temperature", on_policy=False)
    pulled = gradient(found.policy, found.penalty(kind))
    for reverse in (False, True):
        exact = gradient(found.policy, found.divergence(reverse=reverse))
        assert (pulled - exact).abs().max() > 1e-3 * exact.abs().max()
