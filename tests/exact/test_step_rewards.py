"""Step rewards on a policy small enough to enumerate: what each token earns gives the gradient of the expected sum."""

import pytest
import torch

from rlmm.objectives.credit import earned
from tests.exact.enumerable import (
    IMAGES_NS,
    LENGTH,
    PROMPTS,
    assert_same,
    every_image,
    gradient,
    law_named,
    make_policy,
)

ENDS = (1 / 3, 2 / 3, 1.0)


@pytest.mark.parametrize("law", ["plain", "guidance"])
def test_the_score_times_what_is_earned_is_the_gradient_of_the_expected_steps(law: str) -> None:
    """Each step's value depends on the codes decided by its end alone, so what is decided later need not earn it."""
    policy = make_policy()
    made = every_image(policy, law_named(law, policy), PROMPTS[:1])
    draw = torch.Generator().manual_seed(3)
    values = [torch.randn((4,) * (k + 1), dtype=torch.float64, generator=draw) for k in range(LENGTH)]
    steps = [
        [(end, float(value[tuple(image[: k + 1])])) for k, (end, value) in enumerate(zip(ENDS, values, strict=True))]
        for image in IMAGES_NS.tolist()
    ]
    logp_NS = policy.log_probs(made).logp_BS
    chance_N = logp_NS.sum(1).exp()
    expected = (chance_N * torch.tensor([sum(v for _, v in row) for row in steps], dtype=torch.float64)).sum()
    earned_NS = earned(steps, made.target_mask, made.step)
    score = (chance_N.detach()[:, None] * earned_NS * logp_NS).sum()
    assert_same(gradient(policy, score), gradient(policy, expected))
    whole_NS = earned_NS[:, :1].expand_as(earned_NS)  # the same for every token is right, too, and noisier
    assert_same(gradient(policy, (chance_N.detach()[:, None] * whole_NS * logp_NS).sum()), gradient(policy, expected))
    late_NS = earned_NS - torch.tensor([row[-1][1] for row in steps], dtype=torch.float64)[:, None]
    gap = gradient(policy, (chance_N.detach()[:, None] * late_NS * logp_NS).sum()) - gradient(policy, expected)
    assert float(gap.abs().max()) > 1e-3
