"""Rewards of a step -> advantages, group by group.

float64 numpy with exactly rounded sums, so that the order of the rows cannot matter.
"""

from dataclasses import dataclass
from math import fsum, inf, sqrt
from typing import Any

import numpy as np

from rlmm.objectives.records import Baseline, FlatGroups, Scale


@dataclass(frozen=True)
class AdvantageResult:
    """Advantages of a step and what was left out of it.

    `kept_B`: the row takes part in the loss and in its denominators. `groups` counts groups with at least two
    available rewards, `small_groups` those with fewer (skipped), `flat_groups` those with a std at or below
    the floor.
    """

    advantage_B: np.ndarray
    kept_B: np.ndarray
    groups: int
    flat_groups: int
    small_groups: int
    unavailable: int
    clipped: int

    @property
    def flat_share(self) -> float:
        """Flat groups / groups with at least two available rewards; 0 where there are none."""
        return self.flat_groups / self.groups if self.groups else 0.0


def group_advantages(
    reward_B: Any,
    valid_B: Any,
    group_B: Any,
    *,
    baseline: Baseline,
    scale: Scale,
    std_floor: float = 1e-6,
    flat_groups: FlatGroups = "drop",
    clip: float | None = None,
) -> AdvantageResult:
    """A = (r - baseline) / scale over the available rewards of each group.

    reward_B: float [B]; valid_B: bool [B], False where the reward is unavailable; group_B: ids or names
    [B]. Baselines: `mean` of the group (arXiv 2402.03300) or `leave_one_out`, the mean of the others (arXiv
    2402.14740), or `batch_mean` of these over the whole step (arXiv 2501.03262). Scales are sample
    standard deviations (n - 1), of the group or of all available rewards of the step in groups of two and
    more. An unavailable reward enters no statistic. Rows of a group with fewer than two available rewards
    are not kept. A group with std <= `std_floor` has advantages 0 and is not kept (`drop`), or kept so that
    it still counts in the denominators (`count`); under `batch_mean` it has a signal of its own, and only a
    step without spread is treated so. `clip` bounds |A|. An available reward that is not finite, or columns
    of unequal length, is a ValueError.
    """
    reward, valid, group = np.asarray(reward_B, np.float64), np.asarray(valid_B, bool), np.asarray(group_B)
    _check(reward, valid, group)
    members = [np.flatnonzero(valid & (group == name)) for name in np.unique(group)]
    scored = [rows for rows in members if len(rows) >= 2]
    every = reward[np.concatenate(scored)] if scored else np.zeros(1)
    batch_mean, batch_std = fsum(every) / len(every), _std(every)

    advantage, kept, flat = np.zeros(len(reward)), np.zeros(len(reward), bool), 0
    for rows in scored:
        std = _std(reward[rows])
        if (batch_std if baseline == "batch_mean" else std) <= std_floor:
            flat += 1
            kept[rows] = flat_groups == "count"
            continue
        divisor = {"group_std": std, "batch_std": batch_std, "none": 1.0}[scale]
        advantage[rows] = _centred(reward[rows], baseline, batch_mean) / divisor
        kept[rows] = True
    limit = inf if clip is None else clip
    return AdvantageResult(
        advantage_B=np.clip(advantage, -limit, limit),
        kept_B=kept,
        groups=len(scored),
        flat_groups=flat,
        small_groups=len(members) - len(scored),
        unavailable=int((~valid).sum()),
        clipped=int((np.abs(advantage) > limit).sum()),
    )


def _centred(reward_G: np.ndarray, baseline: Baseline, batch_mean: float) -> np.ndarray:
    if baseline == "batch_mean":
        return reward_G - batch_mean
    count = len(reward_G)
    centred = reward_G - fsum(reward_G) / count
    # r - mean of the others = n / (n - 1) * (r - mean of all)
    return centred * (count / (count - 1)) if baseline == "leave_one_out" else centred


def _std(reward_G: np.ndarray) -> float:
    if reward_G.max() == reward_G.min():  # the rounded mean of equal numbers need not equal them
        return 0.0
    return sqrt(fsum((reward_G - fsum(reward_G) / len(reward_G)) ** 2) / (len(reward_G) - 1))


def _check(reward: np.ndarray, valid: np.ndarray, group: np.ndarray) -> None:
    if not (reward.shape == valid.shape == group.shape) or reward.ndim != 1:
        raise ValueError(
            f"rewards {reward.shape}, validity {valid.shape} and groups {group.shape} must be columns of equal length"
        )
    bad = np.flatnonzero(valid & ~np.isfinite(reward))
    if len(bad):
        raise ValueError(
            f"{len(bad)} available rewards are not finite, first at rows {bad[:5].tolist()}: a reward that"
            " could not be computed is marked unavailable, never a number"
        )
