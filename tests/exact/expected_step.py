"""The expected gradient of an update of a real policy: every draw of a step, through the pieces the GRPO stage uses.

`CausalPolicy.log_probs`, `group_advantages`, `token_weights` and `grpo_loss` (with its mismatch gate) run as they do in
training. The loss is linear in the token weights, so one batch holds every draw, weighed by its probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import Any

import torch
from torch import Tensor

from rlmm.config.stages import GrpoStage
from rlmm.objectives.advantages import group_advantages
from rlmm.objectives.weights import count_totals, token_weights
from rlmm.policies.causal import CausalPolicy
from rlmm.train.grpo import GrpoBatch, grpo_loss
from rlmm.train.metrics import Meter
from rollouts.law import Law
from rollouts.trajectory import Trajectory
from tests.exact.enumerable import LENGTH, PROMPTS, every_image, gradient, place, rewards, table


def stage(objective: str | dict[str, Any]) -> GrpoStage:
    """A GRPO stage with that objective, whose mismatch gate is 1e-9 nats."""
    named = {"name": objective} if isinstance(objective, str) else objective
    gates = {"mismatch_mean": 1e-9, "mismatch_max": 1e-9}
    return GrpoStage.model_validate({"steps": 1, "learning_rate": 1.0, "objective": named, "gates": gates})


def loss(policy: CausalPolicy, config: GrpoStage, batch: GrpoBatch) -> Tensor:
    return grpo_loss(policy, config, policy.model, batch, Meter())


@dataclass(frozen=True)
class Draw:
    """One possible step: rows of the trajectory, the group of each, and how likely the step is."""

    rows: tuple[int, ...]
    groups: tuple[int, ...]
    probability: float


@dataclass(frozen=True)
class Images:
    """Every possible image of each prompt, with its probability and reward."""

    trajectory: Trajectory
    probability_B: Tensor
    reward_B: Tensor

    def rows(self, prompt: str) -> list[int]:
        return [row for row, name in enumerate(self.trajectory.group_id) if name == prompt]


def images(policy: CausalPolicy, law: Law) -> Images:
    every = every_image(policy, law)
    reward_B = rewards()[[PROMPTS.index(name) for name in every.group_id], place(every, policy)]
    return Images(every, every.sampler_logp.sum(1).exp(), reward_B)


def groups_of(known: Images, prompt: str, size: int) -> list[tuple[tuple[int, ...], float]]:
    """Every group of `size` images of a prompt, order aside, and its probability."""
    found = []
    for rows in combinations_with_replacement(known.rows(prompt), size):
        orders = factorial(size) / prod(factorial(rows.count(row)) for row in set(rows))
        found.append((rows, orders * float(known.probability_B[list(rows)].prod())))
    return found


def steps_of_one_group(known: Images, size: int = 2) -> list[Draw]:
    """A prompt by chance, then a group of it."""
    return [
        Draw(rows, (0,) * size, probability / len(PROMPTS))
        for prompt in PROMPTS
        for rows, probability in groups_of(known, prompt, size)
    ]


def steps_of_both_prompts(known: Images) -> list[Draw]:
    """A pair of each prompt."""
    first, second = (groups_of(known, prompt, 2) for prompt in PROMPTS)
    return [Draw(a + b, (0, 0, 1, 1), p * q) for a, p in first for b, q in second]


def expected_gradient(policy: CausalPolicy, config: GrpoStage, known: Images, draws: Sequence[Draw]) -> Tensor:
    """sum over draws of P(draw) x gradient of the step's loss."""
    parts = [_advantages_and_weights(config, known, draw) for draw in draws]
    advantage, kept, weight = (torch.cat(column) for column in zip(*parts, strict=True))
    rows = [row for draw in draws for row in draw.rows]
    batch = GrpoBatch(known.trajectory.rows(rows), advantage, kept, weight, gate=True)
    return gradient(policy, loss(policy, config, batch))


def _advantages_and_weights(config: GrpoStage, known: Images, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    objective, rows = config.objective.objective(), list(draw.rows)
    result = group_advantages(
        known.reward_B[rows],
        [True] * len(rows),
        draw.groups,
        baseline=objective.baseline,
        scale=objective.scale,
        flat_groups=objective.flat_groups,
    )
    kept, mask = torch.from_numpy(result.kept_B), known.trajectory.target_mask[rows]
    weight = token_weights(
        objective.weights, mask, kept, totals=count_totals(mask, kept), max_length=LENGTH, dtype=torch.float64
    )
    return torch.from_numpy(result.advantage_B), kept, weight * draw.probability


def expected_reward(policy: CausalPolicy, law: Law) -> Tensor:
    """Of an image of each prompt, mean over the prompts, with gradient."""
    means = [
        (table(policy, law, prompt).probability() * reward_N).sum()
        for prompt, reward_N in zip(PROMPTS, rewards(), strict=True)
    ]
    return torch.stack(means).mean()
