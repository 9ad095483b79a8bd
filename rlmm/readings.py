"""What a masked policy reads of a micro-batch: how many partly masked sequences, and how many positions of them.

Counts are those of the mean over masks and steps; what depends on how sure the policy is (order `threshold`) is counted
as of one that is never sure.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlmm.config.masked import EstimatorConfig, NoiseConfig
from rlmm.config.preference import PairNoise
from rlmm.config.stages import DpoStage, GrpoStage, PolicyStage, SftStage
from rlmm.dry_run import Reading
from rlmm.objectives.legality import LogProbKind
from rlmm.objectives.noise import count_chances, mean_share
from rollouts.unmasking import Unmasking, masked_counts, planned_steps

ROWS = 16
"""Of which the mean is taken, where chance decides how many positions a step reveals."""


def update_reading(stage: PolicyStage, positions: int) -> Reading:
    """Of a stage's update, images of `positions` decided positions."""
    rows = stage.micro_batch_size
    if isinstance(stage, SftStage):
        return Reading(rows, round(rows * positions * supervised_share(stage, positions)))
    if isinstance(stage, DpoStage):
        noise = stage.noise or PairNoise()
        states = rows * noise.draws * (1 if stage.loss == "kto" else 2)
        return Reading(states, round(states * positions * mean_share(noise.scheme)))
    assert isinstance(stage, GrpoStage), "no other stage trains a policy"
    estimator = stage.estimator or EstimatorConfig()
    if estimator.kind == "trajectory":
        return _along(_unmasking(stage), positions, rows, estimator.steps, estimator.order_term)
    states = rows * estimator.draws
    return Reading(states, round(states * positions * mean_share(estimator.kind, estimator.ratios)))


def supervised_share(stage: SftStage, positions: int) -> float:
    """Share of a row's targets that is masked to learn from; of a mask and its complement, the half."""
    noise = stage.noise or NoiseConfig()
    if noise.complementary:
        return 0.5
    chance = count_chances(noise.schedule, positions)
    return float((chance * np.arange(1, len(chance) + 1)).sum()) / len(chance)


def gate_reading(stage: PolicyStage, positions: int) -> Reading | None:
    """Of the mismatch gate, where it reads a step of the trajectory beside what the loss reads; None where not."""
    if not isinstance(stage, GrpoStage) or stage.estimator is None or stage.max_staleness:
        return None
    if stage.estimator.record().kind in (LogProbKind.EXACT, LogProbKind.TRAJECTORY):
        return None
    return _along(_unmasking(stage), positions, stage.micro_batch_size, 1, order_term=True)


def widest_step(unmasking: Unmasking, positions: int) -> int:
    """Positions of a row for which a sampler draws tokens at once, in the step where they are most."""
    return positions if not unmasking.policy_free else round(float(_revealed(unmasking, positions).mean(0).max()))


def _unmasking(stage: GrpoStage) -> Unmasking:
    assert stage.sampling.unmasking is not None, "the recipe lets no masked policy be without"
    return stage.sampling.unmasking.record()


def _along(unmasking: Unmasking, positions: int, rows: int, steps: int | None, order_term: bool) -> Reading:
    """Of trajectories, at `steps` of their steps or all."""
    there = _steps(unmasking, positions)
    read = min(there, steps or there)
    if unmasking.policy_free or not order_term:
        return Reading(round(rows * read), round(rows * positions * read / there))
    masked = sum(_masked(unmasking, positions))
    return Reading(round(rows * read), round(rows * masked * read / there), unmasking)


def _steps(unmasking: Unmasking, positions: int) -> float:
    """Steps in which a row has something revealed."""
    if unmasking.order != "ancestral":
        return unmasking.steps
    return float((_revealed(unmasking, positions) > 0).sum(1).double().mean())


def _revealed(unmasking: Unmasking, positions: int) -> Tensor:
    """How many positions each step of an order made beforehand reveals, of some rows [rows, T] (float64)."""
    step_BS = planned_steps(unmasking, torch.ones(ROWS, positions, dtype=torch.bool), range(ROWS))
    return torch.stack([(step_BS == step).sum(1) for step in range(unmasking.steps)], 1).double()


def _masked(unmasking: Unmasking, positions: int) -> Sequence[int]:
    """Masked positions before each step of an order that the policy's confidence chooses."""
    if unmasking.threshold is not None:
        return [positions - step for step in range(unmasking.steps)]
    return [positions, *masked_counts(unmasking.schedule, unmasking.steps, positions)][:-1]
