"""What each named objective follows in expectation: the gradient of the expected reward where it is unbiased, and the
exact form of its bias where it is not, for a real policy under guided, tempered and truncated laws.

Images all have three tokens, so the mean over a row's tokens and a constant length both divide by 3.
"""

import pytest
import torch
from torch import Tensor

from rlmm.policies.causal import CausalPolicy
from rollouts.law import Law
from tests.exact.enumerable import LENGTH, PROMPTS, assert_same, gradient, law_named, make_policy, rewards, table
from tests.exact.expected_step import (
    Draw,
    Images,
    expected_gradient,
    expected_reward,
    images,
    stage,
    steps_of_both_prompts,
    steps_of_one_group,
)

LAWS = ["plain", "guidance, temperature", "guidance, top-k"]
SMALL = "top-k"  # 8 images a prompt: few enough for every step of two groups


def exact(policy: CausalPolicy, law: Law) -> Tensor:
    return -gradient(policy, expected_reward(policy, law))


def win_rate(policy: CausalPolicy, law: Law, factor: tuple[float, ...] = (1.0, 1.0)) -> Tensor:
    """Mean over prompts of sum_y pi(y) E_{y' ~ stop-gradient pi}[sign(r - r')] / sqrt(2), each times its factor.

    In a pair (r - mean) / std is sign(r - r') / sqrt(2), whatever the margin.
    """
    parts = []
    for prompt, reward_N, times in zip(PROMPTS, rewards(), factor, strict=True):
        probability_N = table(policy, law, prompt).probability()
        win_N = (reward_N[:, None] - reward_N[None, :]).sign() @ probability_N.detach() / 2**0.5
        parts.append(times * (probability_N * win_N).sum())
    return torch.stack(parts).mean()


def flat_chance(policy: CausalPolicy, law: Law, prompt: str) -> float:
    """That both images of a pair are the same one (the rewards have no other ties)."""
    return float((table(policy, law, prompt).probability().detach() ** 2).sum())


@pytest.fixture
def policy() -> CausalPolicy:
    return make_policy()


@pytest.mark.parametrize("name", LAWS)
def test_rloo_is_unbiased(policy: CausalPolicy, name: str) -> None:
    law = law_named(name, policy)
    known = images(policy, law)
    assert_same(expected_gradient(policy, stage("rloo"), known, steps_of_one_group(known)), exact(policy, law))


def test_rloo_is_unbiased_in_threes(policy: CausalPolicy) -> None:
    law = law_named(SMALL, policy)
    known = images(policy, law)
    assert_same(expected_gradient(policy, stage("rloo"), known, steps_of_one_group(known, 3)), exact(policy, law))


@pytest.mark.parametrize(("size", "name"), [(2, "guidance, top-k"), (3, SMALL)])
def test_dr_grpo_is_the_exact_gradient_times_a_constant(policy: CausalPolicy, size: int, name: str) -> None:
    """The mean includes the sample itself: a factor (G - 1) / G. The constant length is 3."""
    law = law_named(name, policy)
    known = images(policy, law)
    found = expected_gradient(policy, stage("dr_grpo"), known, steps_of_one_group(known, size))
    assert_same(found, exact(policy, law) * (size - 1) / size / LENGTH)


@pytest.mark.parametrize("name", ["plain", "guidance, top-k"])
def test_grpo_in_pairs_follows_the_win_rate(policy: CausalPolicy, name: str) -> None:
    law = law_named(name, policy)
    known = images(policy, law)
    found = expected_gradient(policy, stage("grpo"), known, steps_of_one_group(known))
    assert_same(found, -gradient(policy, win_rate(policy, law)) / LENGTH)
    assert torch.cosine_similarity(found, exact(policy, law), dim=0) < 0.999


@pytest.mark.parametrize("objective", ["dapo", "bnpo", "gspo", "cispo", "reinforce++"])
def test_where_lengths_are_equal_and_the_ratio_is_one_its_relatives_follow_it_too(
    policy: CausalPolicy, objective: str
) -> None:
    law = law_named("guidance, top-k", policy)
    known = images(policy, law)
    found = expected_gradient(policy, stage(objective), known, steps_of_one_group(known))
    assert_same(found, -gradient(policy, win_rate(policy, law)) / LENGTH)


def test_two_prompts_a_step_leave_rloo_and_dr_grpo_exact(policy: CausalPolicy) -> None:
    law = law_named(SMALL, policy)
    known = images(policy, law)
    draws = steps_of_both_prompts(known)
    assert_same(expected_gradient(policy, stage("rloo"), known, draws), exact(policy, law))
    assert_same(expected_gradient(policy, stage("dr_grpo"), known, draws), exact(policy, law) / 2 / LENGTH)


@pytest.mark.parametrize("objective", ["grpo", "dapo", "bnpo", "gspo", "cispo"])
def test_a_dropped_flat_group_lends_its_share_to_the_other_prompt(policy: CausalPolicy, objective: str) -> None:
    """Each prompt's win-rate gradient counts 1 + (chance that the other's pair is flat) times."""
    law = law_named(SMALL, policy)
    known = images(policy, law)
    first, second = (1 + flat_chance(policy, law, prompt) for prompt in PROMPTS)
    assert abs(first - second) > 0.05
    found = expected_gradient(policy, stage(objective), known, steps_of_both_prompts(known))
    assert_same(found, -gradient(policy, win_rate(policy, law, (second, first))) / LENGTH)


def test_reinforce_plus_plus_without_its_scale_is_exact_up_to_a_constant(policy: CausalPolicy) -> None:
    """The mean of four rewards includes the sample itself: a factor 3 / 4."""
    law = law_named(SMALL, policy)
    known = images(policy, law)
    config = stage({"name": "reinforce++", "advantage": {"scale": "none"}})
    found = expected_gradient(policy, config, known, steps_of_both_prompts(known))
    assert_same(found, exact(policy, law) * 3 / 4 / LENGTH)


def test_reinforce_plus_plus_divides_each_step_by_its_own_spread(policy: CausalPolicy) -> None:
    law = law_named(SMALL, policy)
    known = images(policy, law)
    draws = steps_of_both_prompts(known)
    found = expected_gradient(policy, stage("reinforce++"), known, draws)
    assert_same(found, -gradient(policy, (_scaled_gain(known, draws) * _row_log_probs(policy, law)).sum()))
    assert torch.cosine_similarity(found, exact(policy, law), dim=0) < 0.9999


def _scaled_gain(known: Images, draws: list[Draw]) -> Tensor:
    """E[sum_i (r_i - mean) / std over the rows i that are a given image] / (rows x length), by image [B]."""
    rows = torch.tensor([draw.rows for draw in draws])
    reward_DR = known.reward_B[rows]
    chance_D = torch.tensor([draw.probability for draw in draws], dtype=torch.float64)
    gain_DR = (reward_DR - reward_DR.mean(1, keepdim=True)) / reward_DR.std(1, keepdim=True)
    total = torch.zeros(len(known.reward_B), dtype=torch.float64)
    return total.index_add(0, rows.flatten(), (chance_D[:, None] * gain_DR).flatten()) / rows.shape[1] / LENGTH


def _row_log_probs(policy: CausalPolicy, law: Law) -> Tensor:
    """Log-prob of every possible image, prompt by prompt [B]."""
    tables = [table(policy, law, prompt) for prompt in PROMPTS]
    return torch.cat([one.chosen().sum(1)[one.possible()] for one in tables])
