"""Every law of a real policy, image by image: what the engine draws and records, the trainer's log-probs and ratios.

All in float64 against the definition in `enumerable`, for two prompts of different lengths in one batch.
"""

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from rlmm.objectives.policy_gradient import clipped_policy_loss
from rollouts.law import GuidanceMode, Law, unpack_support
from rollouts.trajectory import Trajectory
from tests.exact.enumerable import (
    CODES,
    IMAGES_NS,
    LAWS,
    PROMPTS,
    assert_same,
    draw_rows,
    every_image,
    gradient,
    law_named,
    make_policy,
    perturbed,
    place,
    table,
)


def of_prompt(trajectory: Trajectory, prompt: str) -> Tensor:
    """Rows of a prompt."""
    return torch.tensor([row for row, name in enumerate(trajectory.group_id) if name == prompt])


@pytest.mark.parametrize("name", LAWS)
def test_the_engine_records_the_enumerated_law(name: str) -> None:
    policy = make_policy()
    law = law_named(name, policy)
    drawn = draw_rows(policy, law, 300)
    for prompt in PROMPTS:
        exact, rows = table(policy, law, prompt), of_prompt(drawn, prompt)
        at = place(drawn, policy)[rows]
        assert len(at.unique()) > 2
        torch.testing.assert_close(drawn.sampler_logp[rows], exact.chosen()[at].detach(), rtol=1e-9, atol=1e-12)
        if law.truncated:
            assert drawn.support is not None
            assert torch.equal(unpack_support(drawn.support[rows], CODES), exact.support_NSV[at])
        else:
            assert drawn.support is None and exact.support_NSV.all()


@pytest.mark.parametrize("name", LAWS)
def test_draws_have_the_enumerated_frequencies(name: str) -> None:
    """Chi-square over whole images; cells of fewer than five expected draws are taken together."""
    policy, count = make_policy(), 4000
    law = law_named(name, policy)
    drawn = draw_rows(policy, law, count)
    for prompt in PROMPTS:
        expected_N = table(policy, law, prompt).probability().detach() * count
        seen_N = torch.bincount(place(drawn, policy)[of_prompt(drawn, prompt)], minlength=len(IMAGES_NS))
        assert (seen_N[expected_N == 0] == 0).all()
        rare_N = expected_N < 5
        expected = torch.cat([expected_N[~rare_N], expected_N[rare_N].sum()[None]])
        seen = torch.cat([seen_N[~rare_N], seen_N[rare_N].sum()[None]])
        used = expected > 0
        statistic = ((seen - expected) ** 2 / expected)[used].sum()
        assert chi2.sf(float(statistic), int(used.sum()) - 1) > 1e-3


@pytest.mark.parametrize("name", LAWS)
def test_log_probs_and_their_gradient_are_the_definitions(name: str) -> None:
    policy = make_policy()
    law = law_named(name, policy)
    every = every_image(policy, law)
    logp_BS = policy.log_probs(every).logp_BS
    exact_BS = torch.cat([table(policy, law, p).chosen()[place(every, policy)[of_prompt(every, p)]] for p in PROMPTS])
    assert_same(logp_BS, exact_BS)
    pull_BS = torch.randn(logp_BS.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_same(gradient(policy, (pull_BS * logp_BS).sum()), gradient(policy, (pull_BS * exact_BS).sum()))


@pytest.mark.parametrize("source", ["every image", "the engine's draws"])
@pytest.mark.parametrize("name", LAWS)
def test_ratios_are_exact_over_the_stored_support(name: str, source: str) -> None:
    """pi_new(image) / pi_old(image), as the loss has them: tokens that multiply to it, or their geometric mean."""
    old, new = make_policy(), perturbed(make_policy(), scale=0.1)
    law = law_named(name, old)
    rows = every_image(old, law) if source == "every image" else draw_rows(old, law, 200)
    with torch.no_grad():
        logp_BS = new.log_probs(rows).logp_BS
    token, sequence = (
        clipped_policy_loss(
            logp_BS, rows.sampler_logp, torch.ones(len(rows)), clip_low=1, clip_high=9, level=level
        ).ratio_BS
        for level in ("token", "sequence")
    )
    for prompt in PROMPTS:
        before = table(old, law, prompt)
        after = table(new, law, prompt, support_NSV=before.support_NSV)
        at, mine = place(rows, old)[of_prompt(rows, prompt)], of_prompt(rows, prompt)
        exact_B = (after.probability() / before.probability())[at].detach()
        assert (exact_B - 1).abs().max() > 0.05
        torch.testing.assert_close(token[mine].prod(1), exact_B, rtol=1e-9, atol=0)
        torch.testing.assert_close(sequence[mine], (exact_B ** (1 / 3))[:, None].expand(-1, 3), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", LAWS)
def test_ratios_make_expectations_under_the_new_policy(name: str) -> None:
    """sum over images of pi_old x ratio is 1: on the stored support the new law is a law again."""
    old, new = make_policy(), perturbed(make_policy(), scale=0.1)
    law = law_named(name, old)
    every = every_image(old, law)
    with torch.no_grad():
        ratio_B = (new.log_probs(every).logp_BS - every.sampler_logp).sum(1).exp()
    for prompt in PROMPTS:
        mine = of_prompt(every, prompt)
        assert float((every.sampler_logp[mine].sum(1).exp() * ratio_B[mine]).sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in LAWS if "top" in name])
def test_the_new_policys_own_support_is_another(name: str) -> None:
    """So the tests above would see a support that was made again instead of read."""
    old, new = make_policy(), perturbed(make_policy(), scale=0.1)
    law = law_named(name, old)
    assert any(
        not torch.equal(table(old, law, prompt).support_NSV, table(new, law, prompt).support_NSV) for prompt in PROMPTS
    )


@pytest.mark.parametrize(("mode", "plain"), [("conditional_only", (0.8, 1.0)), ("rescaled", (2.0, 2.5))])
def test_published_conventions_are_the_laws_they_claim(mode: GuidanceMode, plain: tuple[float, float]) -> None:
    """Guidance 2.5 at temperature 0.8: `conditional_only` is scale 1, `rescaled` temperature 2.5 x 0.8."""
    policy = make_policy()
    temperature, scale = plain
    law = Law(policy.layout.image, temperature=0.8, guidance_scale=2.5, mode=mode)
    every = every_image(policy, law)
    stated = Law(policy.layout.image, temperature=temperature, guidance_scale=scale)
    exact_BS = torch.cat([table(policy, stated, prompt).chosen() for prompt in PROMPTS])
    assert_same(policy.log_probs(every).logp_BS, exact_BS)
