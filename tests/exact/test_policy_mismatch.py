"""Updates on images that another model drew: a sampler whose weights are a little off, or the policy of an update ago.

The closed form holds the sampler's prefixes and futures fixed: with Q(prefix, code) the sampler's expected reward and
P(prefix) its chance of a prefix, a token's ratio turns E[Q grad log pi] into sum_code grad pi(code | prefix) Q.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmm.policies.causal import CausalPolicy
from rlmm.train.gates import GateError
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
    rewards,
    table,
)
from tests.exact.expected_step import images, loss, stage

LAWS = ["plain", "guidance, temperature", "guidance, top-k, top-p"]
WIDE = {"low": 0.0, "high": 1e9}
LOW, HIGH = 0.8, 1.25


@pytest.fixture
def policy() -> CausalPolicy:
    return make_policy()


@pytest.fixture
def sampler(policy: CausalPolicy) -> CausalPolicy:
    return perturbed(policy, scale=0.05)


def found_gradient(
    policy: CausalPolicy, sampler: CausalPolicy, law: Law, objective: dict[str, Any], *, stale: bool = False
) -> Tensor:
    """Expected gradient of the stage's loss where advantages are the rewards and the sampler draws. `stale`: its
    log-probs are the old policy's, whose rollout serves a second update."""
    known = images(sampler, law)
    every, count = known.trajectory, len(known.reward_B)
    batch = GrpoBatch(
        every,
        known.reward_B,
        torch.ones(count, dtype=torch.bool),
        known.probability_B[:, None].expand(-1, every.ids.shape[1]),
        gate=not stale,
        old_logp_BS=every.sampler_logp if stale else None,
    )
    return gradient(policy, loss(policy, stage({"name": "rloo", **objective}), batch))


def both(policy: CausalPolicy, sampler: CausalPolicy, law: Law, prompt: str) -> tuple[Table, Table]:
    """Of policy and sampler, over the support the sampler kept."""
    drawn = table(sampler, law, prompt)
    return table(policy, law, prompt, support_NSV=drawn.support_NSV), drawn


def exact_gradient(
    policy: CausalPolicy, sampler: CausalPolicy, law: Law, kept: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """-grad of sum over prompts, prefixes, codes of P(prefix) Q(prefix, code) c log pi, with c = kept(pi, sampler)."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt, reward_N in zip(PROMPTS, rewards(), strict=True):
        current, drawn = both(policy, sampler, law, prompt)
        for at in decisions(drawn, reward_N):
            logp_M = at.logp(current)
            weight_M = kept(logp_M.detach().exp(), at.logp(drawn).detach().exp())
            total = total + (at.prefix_M * at.gain_M * weight_M * logp_M).sum()
    return -gradient(policy, total)


def whole(chance: Tensor, _: Tensor) -> Tensor:
    return chance


def within(chance: Tensor, drawn: Tensor) -> Tensor:
    return (chance / drawn >= LOW) & (chance / drawn <= HIGH)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("name", LAWS)
def test_without_bounds_every_tokens_ratio_is_corrected(
    policy: CausalPolicy, sampler: CausalPolicy, name: str, kind: str
) -> None:
    law = law_named(name, policy)
    exact = exact_gradient(policy, sampler, law, whole)
    assert_same(found_gradient(policy, sampler, law, {"mismatch": {"kind": kind, **WIDE}}), exact)
    uncorrected = exact_gradient(policy, sampler, law, lambda _, drawn: drawn)
    assert (exact - uncorrected).abs().max() > 1e-2 * exact.abs().max()


@pytest.mark.parametrize("surrogate", ["clipped", "cispo", "reinforce"])
@pytest.mark.parametrize("updates", [1, 2])
def test_rollouts_of_older_weights_are_corrected_in_every_update(
    policy: CausalPolicy, sampler: CausalPolicy, surrogate: str, updates: int
) -> None:
    """As under max_staleness: the sampler's weights are older than those before the update, whose log-probs a second
    update has for its ratio. Without a ratio (reinforce) the first update alone is corrected."""
    law, known = law_named("guidance, temperature", policy), images(sampler, law_named("guidance, temperature", policy))
    before = perturbed(policy, scale=0.03, seed=2)
    every, count = known.trajectory, len(known.reward_B)
    with torch.no_grad():
        old_BS = before.log_probs(every).logp_BS if updates == 2 else None
    weight_BS = known.probability_B[:, None].expand(-1, every.ids.shape[1])
    batch = GrpoBatch(every, known.reward_B, torch.ones(count, dtype=torch.bool), weight_BS, False, old_BS)
    bounds = {} if surrogate == "reinforce" else {"clip_low": 1.0, "clip_high": 1e9}
    objective = {"name": "rloo", "surrogate": surrogate, "mismatch": {"kind": "truncate", **WIDE}, **bounds}
    found = gradient(policy, loss(policy, stage(objective), batch))
    exact = exact_gradient(policy, sampler, law, whole)
    if updates == 2 and surrogate == "reinforce":
        assert (found - exact).abs().max() > 1e-3 * exact.abs().max()
    else:
        assert_same(found, exact)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("truncate", lambda chance, drawn: torch.minimum(chance, HIGH * drawn)),
        ("mask", lambda chance, drawn: torch.where(within(chance, drawn), chance, 0.0)),
    ],
)
@pytest.mark.parametrize("name", LAWS)
def test_bounds_leave_out_what_they_say(
    policy: CausalPolicy, sampler: CausalPolicy, name: str, kind: str, kept: Callable[[Tensor, Tensor], Tensor]
) -> None:
    law = law_named(name, policy)
    exact = exact_gradient(policy, sampler, law, kept)
    assert_same(found_gradient(policy, sampler, law, {"mismatch": {"kind": kind, "low": LOW, "high": HIGH}}), exact)
    unbounded = exact_gradient(policy, sampler, law, whole)
    assert (exact - unbounded).abs().max() > 1e-3 * unbounded.abs().max()


@pytest.mark.parametrize("name", LAWS)
def test_rejection_is_the_expectation_over_the_images_that_stay(
    policy: CausalPolicy, sampler: CausalPolicy, name: str
) -> None:
    law, total, shares = law_named(name, policy), torch.zeros((), dtype=torch.float64), []
    for prompt, reward_N in zip(PROMPTS, rewards(), strict=True):
        current, drawn = both(policy, sampler, law, prompt)
        possible = drawn.possible()
        chance, logp = drawn.probability()[possible].detach(), current.chosen()[possible].sum(1)
        mean = (logp.detach().exp() / chance) ** (1 / 3)
        stays = (mean >= LOW) & (mean <= HIGH)
        shares.append(float(chance[stays].sum()))
        total = total + (chance * stays * reward_N[possible] * logp).sum()
    assert max(shares) > 0.2 and min(shares) < 0.999
    found = found_gradient(policy, sampler, law, {"mismatch": {"kind": "reject", "low": LOW, "high": HIGH}})
    assert_same(found, -gradient(policy, total))


@pytest.mark.parametrize("kind", ["truncate", "mask", "reject"])
def test_a_sampler_that_agrees_needs_no_correction(policy: CausalPolicy, kind: str) -> None:
    law = law_named("guidance, top-k, top-p", policy)
    total = torch.stack(
        [(table(policy, law, p).probability() * reward_N).sum() for p, reward_N in zip(PROMPTS, rewards(), strict=True)]
    ).sum()
    found = found_gradient(policy, policy, law, {"mismatch": {"kind": kind, "low": LOW, "high": HIGH}})
    assert_same(found, -gradient(policy, total))


@pytest.mark.parametrize("name", LAWS)
def test_the_ratio_corrects_an_old_policys_decisions(policy: CausalPolicy, sampler: CausalPolicy, name: str) -> None:
    """A second update of a rollout where nothing is clipped."""
    law = law_named(name, policy)
    found = found_gradient(policy, sampler, law, {"clip_low": 1.0, "clip_high": 1e9}, stale=True)
    assert_same(found, exact_gradient(policy, sampler, law, whole))


@pytest.mark.parametrize("name", LAWS)
def test_the_clip_takes_the_gradient_where_it_binds(policy: CausalPolicy, sampler: CausalPolicy, name: str) -> None:
    """Past 1 + high for a good image, below 1 - low for a bad one: so the clip looks at the image's own reward."""
    law, total = law_named(name, policy), torch.zeros((), dtype=torch.float64)
    for prompt, reward_N in zip(PROMPTS, rewards(), strict=True):
        current, drawn = both(policy, sampler, law, prompt)
        keep = drawn.possible()
        ratio_NS = (current.chosen()[keep] - drawn.chosen()[keep].detach()).exp()
        good_N1 = (reward_N[keep] > 0)[:, None]
        bound_NS = torch.where(good_N1, ratio_NS > 1.02, ratio_NS < 0.97)
        assert bound_NS.any() and not bound_NS.all()
        gain_NS = torch.where(bound_NS, 0.0, ratio_NS) * reward_N[keep][:, None]
        total = total + (drawn.probability()[keep].detach() * gain_NS.sum(1)).sum()
    found = found_gradient(policy, sampler, law, {"clip_low": 0.03, "clip_high": 0.02}, stale=True)
    assert_same(found, -gradient(policy, total))


def test_the_gate_stops_the_same_update_without_a_correction(policy: CausalPolicy, sampler: CausalPolicy) -> None:
    law = law_named("plain", policy)
    with pytest.raises(GateError, match="not the sampler's"):
        found_gradient(policy, sampler, law, {})
    assert every_image(sampler, law).sampler_logp.isfinite().all()
