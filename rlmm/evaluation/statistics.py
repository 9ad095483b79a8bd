"""Intervals over prompts, and figures of how much a policy's samples differ. numpy float64.

P prompts, S sampling seeds a prompt, B rows, T positions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import nan
from typing import Any

import numpy as np

_CHUNK = 64  # bootstrap replicates drawn at once: bounds memory at _CHUNK x prompts


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its interval; `excluded` counts the values that were NaN.

    The bounds are NaN with fewer than two prompts: one prompt says nothing about another.
    """

    mean: float
    low: float
    high: float
    prompts: int
    excluded: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def bootstrap_mean(values_PS: Any, *, n: int = 2000, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Mean over prompts of the mean over seeds, with a percentile interval (Efron, Tibshirani 1993, ch. 13).

    The prompts are resampled and keep their seeds together (cluster bootstrap): the seeds of a prompt are not
    independent evidence about other prompts. values_PS: float [P, S] (or [P]); NaN is an unavailable value
    and is left out; a prompt with none available is left out whole. `seed` fixes the draws. ValueError where
    nothing is left.
    """
    values = np.asarray(values_PS, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or np.isinf(values).any():
        raise ValueError(f"expected finite values (or NaN) of shape [prompts, seeds], got shape {values.shape}")
    available = ~np.isnan(values)
    there = available.any(1)
    if not there.any():
        raise ValueError(f"no value is available among {values.size}: there is no mean to report")
    mean_P = np.where(available, values, 0.0).sum(1)[there] / available.sum(1)[there]
    low, high = _percentile_bounds(mean_P, n, seed, confidence) if len(mean_P) > 1 else (nan, nan)
    return Interval(float(mean_P.mean()), low, high, len(mean_P), int((~available).sum()))


def paired_difference(a_PS: Any, b_PS: Any, *, n: int = 2000, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Mean of a - b on the same prompts and seeds, with its bootstrap interval over prompts.

    A cell that is NaN in either is left out of both. ValueError where the shapes differ: then nothing is
    paired.
    """
    a, b = np.asarray(a_PS, np.float64), np.asarray(b_PS, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} cannot be paired: score both on the same prompts and seeds")
    return bootstrap_mean(a - b, n=n, seed=seed, confidence=confidence)


def distinct_share(items: Sequence[Hashable]) -> float:
    """Different items / items: texts, image hashes. ValueError where there are none."""
    if not items:
        raise ValueError("no items: the share of distinct ones is undefined")
    return len(set(items)) / len(items)


def duplicate_share(ids_BT: Any, target_mask_BT: Any, group_B: Any) -> float:
    """Rows whose decided tokens equal an earlier row's of their group / rows that could (all but one a group), so that
    1 is a collapse of every group; 0 where no group has two rows.

    Far above what the policy's entropy explains, the seeds of a group have collapsed.
    """
    groups = _groups(ids_BT, target_mask_BT, group_B)
    could = sum(len(group) - 1 for group in groups)
    return sum(len(group) - len(np.unique(group, axis=0)) for group in groups) / could if could else 0.0


def diversity(ids_BT: Any, target_mask_BT: Any, group_B: Any) -> float:
    """Mean over groups of the mean pairwise Hamming distance of decided tokens / positions either row
    decided.

    0: all samples of a prompt are the same; 1: they agree nowhere. A position decided in one row alone is a
    difference. NaN where no group has two rows.
    """
    groups = [group for group in _groups(ids_BT, target_mask_BT, group_B) if len(group) > 1]
    means = [np.mean([_distance(a, b) for a, b in combinations(group, 2)]) for group in groups]
    return float(np.mean(means)) if means else nan


_NOT_DECIDED = -1


def _groups(ids_BT: Any, target_mask_BT: Any, group_B: Any) -> list[np.ndarray]:
    ids, mask, group = np.asarray(ids_BT), np.asarray(target_mask_BT, bool), np.asarray(group_B)
    if ids.shape != mask.shape or ids.shape[:1] != group.shape:
        raise ValueError(f"ids {ids.shape}, target mask {mask.shape} and groups {group.shape} do not fit together")
    decided = np.where(mask, ids, _NOT_DECIDED)
    return [decided[group == name] for name in np.unique(group)]


def _distance(a_T: np.ndarray, b_T: np.ndarray) -> float:
    either = (a_T != _NOT_DECIDED) | (b_T != _NOT_DECIDED)
    return float((a_T != b_T).sum() / max(1, either.sum()))


def _percentile_bounds(mean_P: np.ndarray, n: int, seed: int, confidence: float) -> tuple[float, float]:
    if n < 1 or not 0 < confidence < 1:
        raise ValueError(f"need at least one replicate and a confidence in (0, 1), got {n} and {confidence}")
    generator, count = np.random.default_rng(seed), len(mean_P)
    sizes = [min(_CHUNK, n - start) for start in range(0, n, _CHUNK)]
    replicates = [mean_P[generator.integers(count, size=(size, count))].mean(1) for size in sizes]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(replicates), [tail, 1 - tail])
    return float(low), float(high)
