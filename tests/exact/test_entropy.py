"""The entropy bonus against the entropy of the enumerated law, and its gradient against autograd through it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlmm.config.stages import GrpoStage
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.grpo_source import GrpoSource
from rlmm.train.metrics import Meter, MetricsFile
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


def test_the_logged_entropy_is_that_of_the_rows_that_count() -> None:
    policy = make_policy()
    made = draw_rows(policy, law_named("plain", policy), 3)
    config = GrpoStage.model_validate({"steps": 1, "learning_rate": 1.0})

    def logged(kept: list[bool]) -> float:
        zeros_BS = torch.zeros(len(made), LENGTH, dtype=torch.float64)
        batch = GrpoBatch(made, zeros_BS[:, 0], torch.tensor(kept), zeros_BS, gate=True)
        meter = Meter()
        grpo_loss(policy, config, policy.model, batch, meter)
        return meter.flush()["entropy"]

    alone = [logged([row == one for row in range(len(made))]) for one in range(len(made))]
    assert logged([row < 2 for row in range(len(made))]) == pytest.approx((alone[0] + alone[1]) / 2)
    assert max(alone) - min(alone) > 1e-3


@pytest.mark.parametrize(
    ("entropies", "acts"),
    [
        ([], True),  # nothing is known before the first step
        ([1.1], False),
        ([1.0], True),
        ([0.9], True),
        ([0.9, 1.1], False),
        ([1.1, 0.9], True),
        ([1.1, None], False),  # a step in which no row counted
    ],
)
def test_the_bonus_acts_after_a_step_at_or_below_the_floor(
    entropies: list[float | None], acts: bool, tmp_path: Path
) -> None:
    bonus = {"entropy": {"coefficient": COEFFICIENT, "floor": 1.0}}
    source = object.__new__(GrpoSource)
    source.config = GrpoStage.model_validate({"steps": 9, "learning_rate": 1.0, "objective": bonus})
    source.metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step, entropy in enumerate(entropies, 1):
        source.metrics.append(step, {} if entropy is None else {"entropy": entropy})
    assert source._entropy_bonus() == (COEFFICIENT if acts else 0.0)
