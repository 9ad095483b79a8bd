"""Advantages of tokens that earn different parts of a reward: those of a span, or those before a step's end.

float64 numpy, as in `advantages`. Shapes: B rows, S positions.
"""

from collections.abc import Sequence
from math import fsum, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

Steps = Sequence[tuple[float, float]]
"""(end, value) of a row's steps: what share of its decisions is made when each ends, rising, and what it earned."""


def normalised_steps(
    steps_B: Sequence[Steps],
    valid_B: Any,
    group_B: Any,
    *,
    scaled: bool,
    std_floor: float = 1e-6,
    keep_flat: bool = False,
) -> tuple[list[Steps], np.ndarray]:
    """The steps with r -> (r - mean) / std over all steps of all available rows of a group, and which rows [B] have a
    group that differs: GRPO with process supervision (arXiv 2402.03300, section 4.1.3); the std is a sample's (n - 1).

    scaled: False only takes the mean away. Rows of groups with fewer than two available ones have steps of 0 and are
    not kept; so have those of groups whose steps' std is at most `std_floor`, but that `keep_flat` keeps them.
    """
    valid, group = np.asarray(valid_B, bool), np.asarray(group_B)
    made: list[Steps] = [[(end, 0.0) for end, _ in steps] for steps in steps_B]
    kept = np.zeros(len(steps_B), bool)
    for name in np.unique(group):
        rows = np.flatnonzero(valid & (group == name))
        if len(rows) < 2:
            continue
        values = [value for row in rows for _, value in steps_B[row]]
        mean = fsum(values) / len(values)
        flat = max(values) == min(values)
        std = 0.0 if flat else sqrt(fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
        if std <= std_floor:
            kept[rows] = keep_flat
            continue
        for row in rows:
            made[row] = [(end, (value - mean) / (std if scaled else 1.0)) for end, value in steps_B[row]]
            kept[row] = True
    return made, kept


def earned(steps_B: Sequence[Steps], decided_BS: Tensor, order_BS: Tensor) -> Tensor:
    """What each decision [B, S] (float64) earns: the sum of the steps that end no earlier than it is made; 0 elsewhere.

    decided_BS: bool, the decisions the steps are of. order_BS: when each is made; equal numbers are made at once.
    """
    found_BS = torch.zeros(decided_BS.shape, dtype=torch.float64)
    for row, steps in enumerate(steps_B):
        at = decided_BS[row].nonzero().squeeze(1)
        if not len(at):
            continue
        order_N = order_BS[row, at]
        # The share of the row's decisions that is made once this one is.
        done_N = (order_N[None] <= order_N[:, None]).double().mean(1)
        for end, value in steps:
            found_BS[row, at] += value * (done_N <= end + 1e-9).double()
    return found_BS
