"""Samples that are frozen when training starts and scored again and again: their scores must not move.

A judge that changes under a run (another model behind the same name, another template, a server that rounds otherwise)
shows here and nowhere else, since what the policy draws changes too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.base import Sample, Score
from rewards.compose import Term
from rewards.runner import RewardRunner
from rewards.wire import WireSample, read_sample, send_sample

Values = Mapping[str, Sequence[float | None]]
"""By term, the raw value of each canary, None where it has none."""


@dataclass(frozen=True)
class Drift:
    """How far a term's scores have moved: the `largest` change of a canary, the same in `spreads` (standard deviations
    of the canaries' first scores, or 1 where these are all equal), and the share of those with a first score that have
    none now (`failed`).
    """

    largest: float
    spreads: float
    failed: float


@dataclass(frozen=True)
class Canaries:
    """Frozen samples and the scores that they had first."""

    samples: tuple[Sample, ...]
    first: Values

    def record(self) -> dict[str, Any]:
        """Everything as JSON has it, images as PNG. What cannot travel was left out by `frozen`."""
        sent = [item for sample in self.samples if isinstance(item := send_sample(sample), WireSample)]
        return {"samples": [item.model_dump() for item in sent], "first": {n: list(v) for n, v in self.first.items()}}

    @staticmethod
    def read(record: Mapping[str, Any]) -> "Canaries":
        """What `record` made. Raises ValueError for what is none."""
        samples = tuple(read_sample(WireSample.model_validate(item)) for item in record["samples"])
        return Canaries(samples, {name: tuple(values) for name, values in record["first"].items()})

    def drift(self, now: Values) -> dict[str, Drift]:
        """How far each term's scores have moved since the first."""
        return {name: _drift(values, now[name]) for name, values in self.first.items()}


def _drift(first: Sequence[float | None], now: Sequence[float | None]) -> Drift:
    had = [value for value in first if value is not None]
    mean = math.fsum(had) / len(had) if had else 0.0
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in had) / len(had)) if had else 0.0
    both = [(a, b) for a, b in zip(first, now, strict=True) if a is not None and b is not None]
    largest = max((abs(b - a) for a, b in both), default=0.0)
    return Drift(largest, largest / (spread or 1.0), 1 - len(both) / len(had) if had else 0.0)


def scores_of(terms: Sequence[Term], samples: Sequence[Sample]) -> Values:
    """Every term's raw values, asked for anew: no cache answers."""
    return {term.name: _fresh(term.runner, samples) for term in terms}


def _fresh(runner: RewardRunner, samples: Sequence[Sample]) -> tuple[float | None, ...]:
    settings = {"batch_size": runner.batch_size, "deadline_s": runner.deadline_s, "retries": runner.retries}
    return tuple(score.value for score in RewardRunner(runner.reward, **settings).score(samples))


def frozen(samples: Sequence[Sample], groups: int) -> tuple[Sample, ...]:
    """The samples of the first groups whose pictures and rows can all be written down, as many as `groups`."""
    by_group: dict[str, list[Sample]] = {}
    for sample in samples:
        by_group.setdefault(sample.group_id, []).append(sample)
    chosen: list[Sample] = []
    for members in by_group.values():
        if groups and not any(isinstance(send_sample(sample), Score) for sample in members):
            chosen += members
            groups -= 1
    return tuple(chosen)
