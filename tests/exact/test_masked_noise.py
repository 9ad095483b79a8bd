"""Noise plans and the estimates made with them, against every mask of a policy small enough to enumerate."""

import random
from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from torch import Tensor

from rlmm.objectives.estimators import Estimator, Upper, sandwiched, upper_log_probs
from rlmm.objectives.legality import LogProbKind
from rlmm.objectives.noise import SCHEME_KINDS, SCHEMES, Scheme, noise_plan, training_noise
from rlmm.policies.masked import MaskedPolicy
from rollouts.unmasking import Unmasking
from tests.exact.masked_enumerable import (
    IMAGES_NS,
    LENGTH,
    elbos,
    image_log_probs,
    law_named,
    make_policy,
    sample,
    state,
    table,
    trajectory_of,
)

STEPWISE = Unmasking(LENGTH, order="random", schedule="linear")
MASKS_MS = torch.tensor(list(product([False, True], repeat=LENGTH)))
NUMBER_S = torch.tensor([4, 2, 1])
DRAWS: dict[Scheme, int] = {
    "count": 2, "stratified": 3, "complement": 2, "quadrature": 3, "bernoulli": 2, "truncated": 2, "coupled": 3,
    "mean_field": 1,
}  # fmt: skip
UNBIASED: list[Scheme] = ["count", "stratified", "complement", "bernoulli"]


@pytest.fixture(scope="module")
def policy() -> MaskedPolicy:
    return make_policy()


@pytest.fixture(scope="module")
def losses(policy: MaskedPolicy) -> Tensor:
    """log p(x_i | x with mask m) of every image, mask and position [N, M, S], 0 where not masked."""
    with torch.no_grad():
        chances = table(policy, law_named("plain", policy))
    rows = [
        [
            [
                float(chances[state(image, [j for j in range(LENGTH) if not mask[j]]), i, image[i]]) if mask[i] else 0.0
                for i in range(LENGTH)
            ]
            for mask in MASKS_MS.tolist()
        ]
        for image in IMAGES_NS.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def estimates(
    scheme: Scheme, losses_NMS: Tensor, rows: int, draws: int | None = None, ratios: tuple[float, float] | None = None
) -> Tensor:
    """Estimates [rows, N] of every image, of as many plans."""
    target = torch.ones(rows, LENGTH, dtype=torch.bool)
    made = noise_plan(scheme, target, range(rows), draws or DRAWS[scheme], ratios=ratios)
    number_Rn = (made.masks_BnS * NUMBER_S).sum(-1)
    return torch.einsum("rns,krns->rk", made.weight_BnS, losses_NMS[:, number_Rn])


def elbo_of(losses_NMS: Tensor) -> Tensor:
    """E_{k ~ U{1..L}} E_{|m| = k} (L / k) sum, over all masks."""
    size_M = MASKS_MS.sum(1)
    share = [0.0 if k == 0 else 1 / LENGTH / comb(LENGTH, int(k)) * LENGTH / int(k) for k in size_M.tolist()]
    return (losses_NMS.sum(-1) * torch.tensor(share, dtype=torch.float64)).sum(1)


def test_the_bound_by_masks_is_the_bound_by_orders_and_lies_below_the_log_prob(
    policy: MaskedPolicy, losses: Tensor
) -> None:
    with torch.no_grad():
        chances = table(policy, law_named("plain", policy))
        torch.testing.assert_close(elbo_of(losses), elbos(chances), rtol=0, atol=1e-10)
        gap = image_log_probs(chances) - elbos(chances)
    assert float(gap.min()) > 0 and float(gap.max()) > 0.1


@pytest.mark.parametrize("scheme", UNBIASED)
def test_the_expectation_is_the_bound(losses: Tensor, scheme: Scheme) -> None:
    found, wanted = estimates(scheme, losses, 20_000), elbo_of(losses)
    error = (found.mean(0) - wanted) / (found.std(0) / len(found) ** 0.5).clamp_min(1e-12)
    assert float(error.abs().max()) < 5


@pytest.mark.parametrize("scheme", ["mean_field", "coupled", "truncated"])
def test_published_baselines_are_no_bound(losses: Tensor, scheme: Scheme) -> None:
    assert SCHEME_KINDS[scheme] not in (LogProbKind.ELBO, LogProbKind.EXACT, LogProbKind.TRAJECTORY)
    found = estimates(scheme, losses, 20_000, ratios=(0.6, 1.0) if scheme == "truncated" else None)
    error = (found.mean(0) - elbo_of(losses)) / (found.std(0) / len(found) ** 0.5).clamp_min(1e-6)
    assert float(error.abs().max()) > 20


def test_the_mean_over_the_masked_is_the_bound_but_for_the_empty_mask(losses: Tensor) -> None:
    """A ratio uniform over (0, 1) makes every count as likely, the empty one included, which scores 0."""
    found = estimates("truncated", losses, 40_000, 1, ratios=(0.0, 1.0))
    wanted = elbo_of(losses) * LENGTH / (LENGTH + 1)
    error = (found.mean(0) - wanted) / (found.std(0) / len(found) ** 0.5)
    assert float(error.abs().max()) < 5


def test_rounding_quadrature_nodes_costs_a_small_bias(losses: Tensor) -> None:
    found, wanted = estimates("quadrature", losses, 20_000).mean(0), elbo_of(losses)
    assert 0.001 < float((found - wanted).abs().mean() / wanted.abs().mean()) < 0.2


@pytest.mark.long
def test_variances_are_in_the_order_that_theory_has_them(losses: Tensor) -> None:
    variance = {
        scheme: float(estimates(scheme, losses, 20_000, draws).var(0).mean())
        for scheme, draws in (("bernoulli", 3), ("count", 3), ("stratified", 3))
    }
    assert variance["stratified"] < variance["count"] < variance["bernoulli"]
    single, many = (float(estimates("count", losses, 20_000, draws).var(0).mean()) for draws in (1, 4))
    assert single / many == pytest.approx(4, rel=0.1)


def test_equal_tokens_have_no_variance_under_counts_and_much_under_ratios() -> None:
    """At 256 positions, where each token's log-prob is -1 whatever is known."""
    target = torch.ones(400, 256, dtype=torch.bool)
    schemes: tuple[Scheme, ...] = ("count", "bernoulli")
    spread = [float(noise_plan(s, target, range(400), 2).weight_BnS.sum((1, 2)).std()) / 256 for s in schemes]
    assert spread[0] < 1e-9 < 0.05 < spread[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_policys_estimate_is_the_weighed_sum_of_its_plan(
    policy: MaskedPolicy, losses: Tensor, scheme: Scheme
) -> None:
    estimator = Estimator(scheme, DRAWS[scheme], ratios=(0.5, 1.0) if scheme == "truncated" else None)
    made = trajectory_of(policy, law_named("plain", policy), STEPWISE, IMAGES_NS, torch.zeros_like(IMAGES_NS))
    plan = estimator.plan(made)
    number_Nn = (plan.masks_BnS * NUMBER_S).sum(-1)
    wanted = (plan.weight_BnS * losses[torch.arange(len(IMAGES_NS))[:, None], number_Nn]).sum(1)
    with torch.no_grad():
        found = policy.log_probs(made, estimator=estimator)
    whole = found.logp_BS if found.scale_BS is None else found.logp_BS * found.scale_BS
    torch.testing.assert_close(whole.sum(1), wanted.sum(1), rtol=0, atol=1e-10)
    if scheme == "truncated":  # one draw's log-probs come as they are, to be weighed outside of a ratio
        single = Estimator("truncated", 1, ratios=(0.5, 1.0))
        with torch.no_grad():
            plain, masks = policy.log_probs(made, estimator=single), single.plan(made).masks_BnS[:, 0]
        number = (masks * NUMBER_S).sum(-1)
        torch.testing.assert_close(plain.logp_BS, losses[torch.arange(len(IMAGES_NS)), number], rtol=0, atol=1e-10)
    assert found.kind == SCHEME_KINDS[scheme]


def test_a_shared_plan_makes_the_difference_of_two_policies_far_steadier(policy: MaskedPolicy) -> None:
    other = make_policy()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.add_(0.003 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    law = law_named("plain", policy)
    made = trajectory_of(policy, law, STEPWISE, IMAGES_NS[:1].expand(400, -1), torch.zeros(400, LENGTH))
    with torch.no_grad():
        mine, theirs = (p.log_probs(made, estimator=Estimator("count")).logp_BS.sum(1) for p in (policy, other))
    paired, unpaired = (mine - theirs).var(), (mine - theirs.roll(1)).var()
    assert float(unpaired / paired) > 20


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_is_a_function_of_its_row_alone(scheme: Scheme) -> None:
    target = torch.rand(6, 40, generator=torch.Generator().manual_seed(3)) < 0.7
    ratios = (0.2, 0.9) if scheme == "truncated" else None
    before = (torch.random.get_rng_state(), str(np.random.get_state()))
    whole = noise_plan(scheme, target, range(6), DRAWS[scheme], ratios=ratios)
    after = (torch.random.get_rng_state(), str(np.random.get_state()))
    assert before[0].equal(after[0]) and before[1] == after[1]
    order = [4, 0, 5]
    part = noise_plan(scheme, target[order], order, DRAWS[scheme], ratios=ratios)
    assert whole.masks_BnS[order].equal(part.masks_BnS) and whole.weight_BnS[order].equal(part.weight_BnS)
    assert not (whole.masks_BnS & ~target[:, None]).any() and not whole.weight_BnS[~whole.masks_BnS].any()


@pytest.mark.parametrize("scheme", [*SCHEMES, "trajectory"])
def test_no_log_prob_and_no_sample_moves_the_processs_random_state(policy: MaskedPolicy, scheme: Scheme) -> None:
    steps = 2 if scheme == "trajectory" else None  # which are drawn
    estimator = Estimator(scheme, DRAWS.get(scheme, 1), (0.5, 1.0) if scheme == "truncated" else None, steps)
    before = (torch.random.get_rng_state(), str(np.random.get_state()), random.getstate())
    made = sample(policy, law_named("guidance", policy), STEPWISE, 5)
    policy.log_probs(made, estimator=estimator).logp_BS.sum().backward()
    policy.model.zero_grad()
    training_noise(made.target_mask, range(5), "cosine", "elbo")
    after = (torch.random.get_rng_state(), str(np.random.get_state()), random.getstate())
    assert before[0].equal(after[0]) and before[1:] == after[1:]


@pytest.mark.parametrize("scheme", [*SCHEMES, "trajectory"])
def test_at_the_old_policy_the_ratio_is_one_and_its_gradient_that_of_the_estimate(
    policy: MaskedPolicy, scheme: Scheme
) -> None:
    """Catches a ratio of a value with its own detached copy used as if it could be clipped, and a lost gradient."""
    from rlmm.objectives.policy_gradient import clipped_policy_loss

    level = "token" if scheme == "truncated" else "sequence"
    estimator = Estimator(scheme, DRAWS.get(scheme, 1), ratios=(0.5, 1.0) if scheme == "truncated" else None)
    made = sample(policy, law_named("guidance", policy), STEPWISE, 5)
    with torch.no_grad():
        old = policy.log_probs(made, estimator=estimator).logp_BS
    now = policy.log_probs(made, estimator=estimator).logp_BS
    advantage_B = torch.tensor([1.0, -2.0, 0.5, 0.0, -1.0]).double()
    loss = clipped_policy_loss(now, old, advantage_B, clip_low=0.2, clip_high=0.2, level=level)
    assert torch.equal(loss.ratio_BS, torch.ones_like(loss.ratio_BS))
    weights = list(policy.model.parameters())
    found = torch.autograd.grad(loss.loss_BS.mean(1).sum(), weights, retain_graph=True, allow_unused=True)
    wanted = torch.autograd.grad(-(advantage_B * now.sum(1) / LENGTH).sum(), weights, allow_unused=True)
    assert sum(float(one.abs().sum()) for one in wanted if one is not None) > 0
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_upper_estimate_is_its_formula_and_no_bound_of_every_image(policy: MaskedPolicy, losses: Tensor) -> None:
    estimator = Estimator("count", 4, upper=Upper(beta=1.5))
    made = trajectory_of(policy, law_named("plain", policy), STEPWISE, IMAGES_NS, torch.zeros_like(IMAGES_NS))
    plan = estimator.plan(made)
    with torch.no_grad():
        found = policy.log_probs(made, estimator=estimator).upper_BS
    assert found is not None
    number_Nn = (plan.masks_BnS * NUMBER_S).sum(-1)
    for row, at in product(range(0, 64, 7), range(LENGTH)):
        chances = [
            float(plan.weight_BnS[row, draw, at]) * float(losses[row, number_Nn[row, draw], at].exp()) ** 1.5
            for draw in range(4)
            if plan.masks_BnS[row, draw, at]
        ]
        wanted = np.log(sum(chances)) / 1.5 if chances else 0.0
        assert float(found[row, at]) == pytest.approx(wanted, abs=1e-9)
    with torch.no_grad():
        weight_M = torch.tensor(
            [0.0 if k == 0 else 1 / comb(LENGTH, int(k)) / int(k) for k in MASKS_MS.sum(1).tolist()]
        )
        weight_NMS = (weight_M.double()[:, None] * MASKS_MS).expand(len(IMAGES_NS), -1, -1)
        limit = upper_log_probs(losses, weight_NMS, 1.5).sum(1)
        log_pi = image_log_probs(table(policy, law_named("plain", policy)))
    violated = float((limit < log_pi).double().mean())
    assert 0 < violated < 1


def test_only_samples_to_be_made_less_likely_are_pushed_from_above() -> None:
    lower, upper = torch.tensor([[-3.0], [-3.0]]), torch.tensor([[-1.0], [-1.0]])
    assert sandwiched(lower, upper, torch.tensor([1.0, -1.0]), 0.25).tolist() == [[-3.0], [-2.5]]


def test_draws_that_do_not_fit_a_scheme_are_refused() -> None:
    target = torch.ones(1, 4, dtype=torch.bool)
    cases: list[tuple[Scheme, int, str]] = [
        ("complement", 3, "2 at"),
        ("coupled", 2, "3 at"),
        ("mean_field", 2, "same"),
    ]
    for scheme, draws, says in cases:
        with pytest.raises(ValueError, match=says):
            noise_plan(scheme, target, [1], draws)
