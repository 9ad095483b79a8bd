"""The entropy bonus against the entropy of the enumerated law, and its gradient against autograd through it."""

from dataclasses import replace

import pytest
import torch

from rlmm.config.stages import GrpoStage
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_source import GrpoBatch
from rlmm.train.metrics import Meter
from tests.exact.enumerable import (
    IMAGES_NS,
    LAWS,
    LENGTH,
    assert_same,
    draw_rows,
    gradient,
    law_named,
    make_policy,
    table,
)

COEFFICIENT = 0.3


@pytest.mark.parametrize("name", list(LAWS))
def test_the_bonus_has_the_exact_gradient_under_every_law(name: str) -> None:
    policy = make_policy()
    law = law_named(name, policy)
    made = draw_rows(policy, law, 3)
    weight_BS = torch.rand(len(made), LENGTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rows = torch.ones(len(made), dtype=torch.bool)
    config = GrpoStage.model_validate({"steps": 1, "learning_rate": 1.0})
    plain = GrpoBatch(made, torch.zeros(len(made), dtype=torch.float64), rows, weight_BS, gate=True)
    bonus = replace(plain, entropy_coefficient=COEFFICIENT)
    assert float(grpo_loss(policy, config, policy.model, plain, Meter()).detach()) == pytest.approx(0, abs=1e-12)
    meter = Meter()
    found = grpo_loss(policy, config, policy.model, bonus, meter)

    entropy = []
    for row in range(len(made)):
        one = table(policy, law, made.group_id[row])
        image = int((IMAGES_NS + policy.layout.image[0] == made.ids[row]).all(1).nonzero())
        possible, logp_SV = one.support_NSV[image], one.logp_NSV[image]
        entropy.append(torch.stack([-(p.exp() * p).sum() for p in (logp_SV[s][possible[s]] for s in range(LENGTH))]))
    entropy_BS = torch.stack(entropy)
    exact = -COEFFICIENT * (weight_BS * entropy_BS).sum()
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-9)
    assert_same(gradient(policy, found), gradient(policy, exact))
    assert meter.flush()["entropy"] == pytest.approx(float(entropy_BS.detach().mean()), rel=1e-9)
    assert entropy_BS.std() > 1e-3
