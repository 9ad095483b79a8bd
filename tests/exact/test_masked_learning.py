"""Learning by each estimate of a masked policy's log-prob, as the stage does it, beside the exact gradient's ascent.

The reward is 1 where the three codes sum to a multiple of 4, else 0: 16 of 64 images. Any image is one code away from a
rewarded one, so an ascent has nowhere to get stuck but at 1, and two codes alone say nothing about the reward, so what
takes the tokens for independent learns it badly. `pytest -s` prints what each has reached.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmm.config.stages import GrpoStage
from rlmm.policies.masked import MaskedPolicy
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.metrics import Meter
from rollouts.law import Law
from rollouts.torch_engine.masked import MaskedTorchEngine
from rollouts.trajectory import Span
from rollouts.unmasking import Unmasking, masked_counts
from tests.exact.masked_enumerable import (
    IMAGES_NS,
    LENGTH,
    confident_paths,
    image_log_probs,
    law_named,
    make_policy,
    request_for,
    table,
)

SEEDS, STEPS, ROWS, RATE = (1, 2), 60, 128, 4e-3
REWARD_N = (IMAGES_NS.sum(1) % 4 == 0).double()
PLACES = torch.tensor([16, 4, 1])
"""Of an image's codes in its number."""


@dataclass(frozen=True)
class Way:
    """An estimator and objective of the stage, the law and the order it samples by."""

    estimator: dict[str, Any]
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "reinforce"})
    law: str = "plain"
    unmasking: Unmasking = Unmasking(LENGTH, order="random", schedule="linear")


GRPO = {"name": "grpo"}
TRAJECTORIES = {
    "trajectory": Way({}, GRPO),
    "trajectory, guided": Way({}, GRPO, law="guidance, temperature"),
    "trajectory, 2 of 3 steps": Way({"steps": 2}, GRPO),
    "trajectory, by confidence": Way({}, GRPO, unmasking=Unmasking(2, order="confidence", schedule="linear")),
}
ESTIMATES = {
    "count": Way({"kind": "count"}),
    "stratified, 3 draws": Way({"kind": "stratified", "draws": 3}),
    "truncated [.6, 1] (MaskGRPO)": Way({"kind": "truncated", "ratios": [0.6, 1.0]}),
    "coupled (DiffuCoder)": Way({"kind": "coupled", "draws": 3}),
    "tokens alone, by confidence (dLLM-RL)": Way(
        {"order_term": False}, GRPO, unmasking=Unmasking(2, order="confidence", schedule="linear")
    ),
    "mean field (d1)": Way({"kind": "mean_field"}),
}


def expected_reward(policy: MaskedPolicy, law: Law, unmasking: Unmasking) -> Tensor:
    """Over every image (every way of decoding, where confidence orders it), with gradient."""
    chances = table(policy, law)
    if unmasking.policy_free:
        return (image_log_probs(chances).exp() * REWARD_N).sum()
    paths = confident_paths(chances, masked_counts(unmasking.schedule, unmasking.steps, LENGTH))
    numbers = torch.tensor([path.image for path in paths]) @ PLACES
    return (torch.stack([path.chance for path in paths]) * REWARD_N[numbers]).sum()


def step_loss(policy: MaskedPolicy, way: Way, step: int) -> Tensor:
    """Of fresh samples, by the stage's own loss; advantages are rewards less their mean."""
    span = Span("image", law_named(way.law, policy), LENGTH, unmasking=way.unmasking)
    request = request_for(policy, range(step * ROWS, (step + 1) * ROWS))
    made = MaskedTorchEngine(policy).generate([request], [span])
    reward_B = REWARD_N[((made.ids - policy.layout.image[0]) * PLACES).sum(1)]
    stage = GrpoStage.model_validate(
        {"steps": 1, "learning_rate": RATE, "estimator": way.estimator, "objective": way.objective}
    )
    weight_BS = torch.full((ROWS, LENGTH), 1 / ROWS, dtype=torch.float64)
    batch = GrpoBatch(made, reward_B - reward_B.mean(), torch.ones(ROWS, dtype=torch.bool), weight_BS, True)
    return grpo_loss(policy, stage, policy.model, batch, Meter())


def ascend(policy: MaskedPolicy, loss_of: Callable[[int], Tensor]) -> None:
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()


@cache
def exact(seed: int) -> float:
    """The expected reward that the ascent along its own gradient reaches."""
    policy, way = make_policy(seed), TRAJECTORIES["trajectory"]
    law = law_named(way.law, policy)
    assert float(expected_reward(policy, law, way.unmasking).detach()) < 0.25
    ascend(policy, lambda _: -expected_reward(policy, law, way.unmasking))
    return float(expected_reward(policy, law, way.unmasking).detach())


def reached(name: str) -> list[float]:
    """The expected reward after learning with samples, over that of the exact gradient, a seed each."""
    way, found = (TRAJECTORIES | ESTIMATES)[name], []
    for seed in SEEDS:
        policy = make_policy(seed)
        ascend(policy, lambda step, policy=policy: step_loss(policy, way, step))
        with torch.no_grad():
            after = float(expected_reward(policy, law_named(way.law, policy), way.unmasking))
        found.append(after / exact(seed))  # which needs gradients
    print(f"{name}: {', '.join(f'{share:.3f}' for share in found)} of the exact gradient's")
    return found


@pytest.mark.slow
def test_the_exact_gradient_reaches_all_of_the_reward() -> None:
    assert min(exact(seed) for seed in SEEDS) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["trajectory", *(pytest.param(n, marks=pytest.mark.long) for n in [*TRAJECTORIES][1:])]
)
def test_trajectories_reach_what_the_exact_gradient_reaches(name: str) -> None:
    assert min(reached(name)) > 0.99


@pytest.mark.long
@pytest.mark.parametrize("name", [*ESTIMATES][:-1])
def test_estimates_that_see_other_tokens_learn_what_depends_on_them(name: str) -> None:
    assert min(reached(name)) > 0.9


@pytest.mark.slow
def test_tokens_taken_for_independent_do_not() -> None:
    assert min(reached("mean field (d1)")) < 0.8
