"""A GRPO step on a masked policy: its loss has the gradient that its estimator's definition asks for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlmm.config.stages import GrpoStage
from rlmm.objectives.estimators import step_weights
from rlmm.objectives.kl import bound_kl
from rlmm.policies.masked import MaskedPolicy
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.metrics import Meter
from rlmm.train.replay import replay
from rollouts.trajectory import Trajectory
from rollouts.unmasking import Unmasking
from tests.exact.masked_enumerable import LENGTH, law_named, make_policy, sample, state, table

ROWS = 6
ADVANTAGE_B = torch.tensor([1.0, -2.0, 0.5, 0.0, -1.0, 1.5]).double()


@pytest.fixture(scope="module")
def policy() -> MaskedPolicy:
    return make_policy()


@pytest.fixture(scope="module")
def made(policy: MaskedPolicy) -> Trajectory:
    return sample(policy, law_named("guidance", policy), Unmasking(LENGTH, schedule="linear"), ROWS)


def gradient(policy: MaskedPolicy, made: Trajectory, estimator: dict[str, Any], objective: dict[str, Any]) -> Tensor:
    """Of the stage's own loss, each decision weighing 1 / rows / length; the gate measures on the way."""
    stage = GrpoStage.model_validate(
        {"steps": 1, "learning_rate": 1e-3, "samples_per_prompt": 2, "prompts_per_step": 3, "micro_batch_size": 6}
        | {"estimator": estimator, "objective": objective}
    )
    weight_BS = torch.full((ROWS, LENGTH), 1 / ROWS / LENGTH, dtype=torch.float64)
    batch = GrpoBatch(made, ADVANTAGE_B, torch.ones(ROWS, dtype=torch.bool), weight_BS, True)
    return flat(policy, grpo_loss(policy, stage, policy.model, batch, Meter()))


def flat(policy: MaskedPolicy, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, list(policy.model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("steps", [None, 1, 2])
def test_a_part_of_the_steps_weighs_for_all_of_them(policy: MaskedPolicy, made: Trajectory, steps: int | None) -> None:
    """-A / rows / length times each evaluated decision's log-prob, read off the table, times 3 / `steps`."""
    chances, weight_BS = table(policy, law_named("guidance", policy)), step_weights(made, steps)
    codes, total = (made.ids - policy.layout.image[0]).tolist(), torch.zeros((), dtype=torch.float64)
    for row, image in enumerate(codes):
        order = made.step[row].tolist()
        for at in range(LENGTH):
            known = [i for i in range(LENGTH) if order[i] < order[at]]
            total = total - ADVANTAGE_B[row] * weight_BS[row, at] * chances[state(image, known), at, image[at]]
    found = gradient(policy, made, {"steps": steps}, {"name": "grpo"})
    torch.testing.assert_close(found, flat(policy, total / ROWS / LENGTH), rtol=1e-7, atol=1e-10)
    assert set(weight_BS.unique().tolist()) == ({1.0} if steps is None else {0.0, 3 / steps})


@pytest.mark.parametrize("objective", [{"name": "gspo"}, {"name": "reinforce"}])
def test_an_estimate_is_driven_by_the_sum_over_its_plan(
    policy: MaskedPolicy, made: Trajectory, objective: dict[str, Any]
) -> None:
    estimator = {"kind": "stratified", "draws": 2}
    stage = GrpoStage.model_validate({"steps": 1, "learning_rate": 1e-3, "estimator": estimator})
    assert stage.estimator is not None
    whole_B = policy.log_probs(made, estimator=stage.estimator.record()).logp_BS.sum(1)
    wanted = flat(policy, -(ADVANTAGE_B * whole_B).sum() / ROWS / LENGTH)
    torch.testing.assert_close(gradient(policy, made, estimator, objective), wanted, rtol=1e-7, atol=1e-10)


def test_the_kl_of_bounds_is_added_to_the_loss_a_row(policy: MaskedPolicy, made: Trajectory) -> None:
    estimator, other = {"kind": "count", "draws": 3}, make_policy(seed=1)
    kl = {"kind": "k2", "coefficient": 0.5}
    stage = GrpoStage.model_validate(
        {"steps": 1, "learning_rate": 1e-3, "estimator": estimator, "objective": {"name": "gspo", "kl": kl}}
    )
    assert stage.estimator is not None and stage.kl_of_bounds
    still = replay(other, made, stage.estimator.record(), 2)
    assert still.draws_Bn is not None and still.draws_Bn.shape == (ROWS, 3)
    mine_Bn = policy.log_probs(made, estimator=stage.estimator.record()).draws_Bn
    assert mine_Bn is not None
    wanted = 0.5 * bound_kl(mine_Bn, still.draws_Bn, made.target_mask.sum(1)).sum() / ROWS

    weight_BS, meter = torch.full((ROWS, LENGTH), 1 / ROWS / LENGTH, dtype=torch.float64), Meter()
    kept_B, none_B = torch.ones(ROWS, dtype=torch.bool), torch.zeros(ROWS, dtype=torch.float64)
    batch = GrpoBatch(made, none_B, kept_B, weight_BS, False, None, still.logp_BS, still.draws_Bn)
    loss = grpo_loss(policy, stage, policy.model, batch, meter)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    torch.testing.assert_close(flat(policy, loss), flat(policy, wanted), rtol=1e-7, atol=1e-12)
    assert meter.flush()["kl"] == pytest.approx(float(wanted.detach()) / 0.5, rel=1e-9)
