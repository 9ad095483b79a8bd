"""Best of n: of n samples the one that a reward likes most. The baseline that training must beat, per sample drawn.

Shapes: P prompts, N samples a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from rewards.compose import Scored
from rlmm.evaluation.statistics import bootstrap_mean


@dataclass(frozen=True)
class CurvePoint:
    """The mean score of the best of `n` samples, over prompts, with its interval."""

    n: int
    mean: float
    low: float
    high: float


def scores_of(scored: Sequence[Scored], penalty: float) -> np.ndarray:
    """Totals [B], NaN where a reward failed; an invalid output has the score `penalty`."""
    return np.array(
        [
            penalty if one.total.status == "invalid_output" else np.nan if one.total.value is None else one.total.value
            for one in scored
        ],
        np.float64,
    )


def best(scores_N: Any) -> int:
    """The number of the highest score; of equal ones, and where none has a score, the first."""
    return int(np.argmax(np.nan_to_num(np.asarray(scores_N, np.float64), nan=-np.inf)))


def expected_best(scores_N: Any, n: int) -> float:
    """The expected highest score of n samples, without bias, from N >= n of them: the mean over all subsets of n, where
    the i-th lowest of the scores is the highest of comb(i - 1, n - 1) of the comb(N, n) subsets.

    Scores that are NaN are left out; NaN where fewer than n are left.
    """
    scores = np.sort(np.asarray(scores_N, np.float64))  # NaN last
    there = scores[~np.isnan(scores)]
    if len(there) < n or n < 1:
        return float("nan")
    weights = np.array([comb(i, n - 1) / comb(len(there), n) for i in range(len(there))])
    return float(weights @ there)


def curve(scores_PN: Any) -> list[CurvePoint]:
    """`expected_best` at n = 1, 2, 4, ... N. A prompt with too few scores is left out of a point, and a point that has
    no prompt left out of the curve."""
    scores = np.asarray(scores_PN, np.float64)
    most = scores.shape[1]
    sizes = sorted({1 << k for k in range(most.bit_length())} | {most})
    points = []
    for n in sizes:
        values = np.array([expected_best(row, n) for row in scores])
        if not np.isnan(values).all():
            found = bootstrap_mean(values)
            points.append(CurvePoint(n, found.mean, found.low, found.high))
    return points
