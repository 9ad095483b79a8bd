"""From scores to advantages: one a row, or one a token where the reward's terms are earned apart."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.compose import CompositeReward, Credit, CreditSpan, Scored
from rlmm.config.stages import GrpoStage
from rlmm.objectives.advantages import AdvantageResult, group_advantages
from rlmm.objectives.credit import Steps, earned, normalised_steps
from rlmm.train.processes import gather, gather_arrays, world
from rollouts.trajectory import IMAGE, TEXT, Trajectory


def advantages(
    scored: Sequence[Scored],
    reward_B: np.ndarray,
    valid_B: np.ndarray,
    made: Trajectory,
    reward: CompositeReward,
    config: GrpoStage,
) -> tuple[AdvantageResult, Tensor, Tensor]:
    """What the whole step came to, then of this process's rows the advantages (float32 [B], or [B, S] where the reward
    has channels) and which rows are kept (bool).

    reward_B, valid_B: the totals. Each channel is normalised in its groups by itself, and a token's advantage is the
    sum over the channels that it earns. A row whose total no term made (a gate's floor, the penalty of invalid output)
    has that number in every channel. A row is kept where some channel keeps it.
    """
    whole = Whole(made, config)
    result = whole.result(reward_B, valid_B)
    if not reward.channels:
        return result, whole.mine(result.advantage_B).float(), whole.mine(result.kept_B)
    advantage_BS = torch.zeros(made.ids.shape, dtype=torch.float64)
    kept_B, mean_B = np.zeros(len(result.kept_B), bool), np.zeros(len(result.kept_B))
    for at, (span, name) in enumerate(reward.channels):
        credits = [_credit(one, at, span, float(total)) for one, total in zip(scored, reward_B, strict=True)]
        decided_BS = tokens_of(span, made)
        if name:
            given = [one.steps or ((1.0, one.value),) for one in credits]
            steps, kept = whole.steps(given, valid_B)
            earned_BS = earned(whole.of_mine(steps), decided_BS, made.step)
            mean_B += [sum(value for _, value in row) / len(row) for row in steps]
        else:
            found = whole.result(np.array([one.value for one in credits]), valid_B)
            earned_BS, kept = whole.mine(found.advantage_B)[:, None] * decided_BS, found.kept_B
            mean_B += found.advantage_B
        advantage_BS, kept_B = advantage_BS + earned_BS, kept_B | kept
    dead = len({group for group, alive in whole.groups_alive(kept_B).items() if not alive}) - result.small_groups
    result = replace(result, advantage_B=mean_B, kept_B=kept_B, flat_groups=max(0, dead), clipped=0)
    return result, advantage_BS.float(), whole.mine(kept_B)


def tokens_of(span: CreditSpan, made: Trajectory) -> Tensor:
    """Which decisions [B, S] a channel's are."""
    if span == "all":
        return made.target_mask
    return made.target_mask & (made.modality == (TEXT if span == "text" else IMAGE))


def _credit(one: Scored, at: int, span: CreditSpan, total: float) -> Credit:
    return one.credits[at] if one.credits else Credit(span, total)


class Whole:
    """The step over all processes, and where this one's rows lie in it."""

    def __init__(self, made: Trajectory, config: GrpoStage) -> None:
        self.settings = config.objective.advantage
        parts = gather(list(made.group_id))
        rank, _ = world()
        self.groups = [group for part in parts for group in part]
        start = sum(len(part) for part in parts[:rank])
        self.slice = slice(start, start + len(made))

    def result(self, reward_B: np.ndarray, valid_B: np.ndarray) -> AdvantageResult:
        """Of this process's columns and the others'."""
        settings = self.settings
        return group_advantages(
            np.concatenate(gather_arrays(reward_B)),
            np.concatenate(gather_arrays(valid_B)),
            self.groups,
            baseline=settings.baseline,
            scale=settings.scale,
            std_floor=settings.std_floor,
            flat_groups=settings.flat_groups,
            clip=settings.clip,
        )

    def steps(self, steps_B: Sequence[Steps], valid_B: np.ndarray) -> tuple[list[Steps], np.ndarray]:
        """Normalised over every process's rows."""
        settings, parts = self.settings, gather([[[end, float(value)] for end, value in row] for row in steps_B])
        return normalised_steps(
            [[(end, value) for end, value in row] for part in parts for row in part],
            np.concatenate(gather_arrays(valid_B)),
            self.groups,
            scaled=settings.scale == "group_std",
            std_floor=settings.std_floor,
            keep_flat=settings.flat_groups == "count",
        )

    def mine(self, column: np.ndarray) -> Tensor:
        return torch.from_numpy(column[self.slice])

    def of_mine(self, rows: Sequence[Any]) -> Sequence[Any]:
        return rows[self.slice]

    def groups_alive(self, kept_B: np.ndarray) -> dict[str, bool]:
        """Group -> whether any of its rows is kept."""
        alive: dict[str, bool] = {}
        for group, kept in zip(self.groups, kept_B, strict=True):
            alive[group] = alive.get(group, False) or bool(kept)
        return alive
