"""What a runner makes of a reward's answers, and what it counts."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from rewards.base import Score

LATENCIES_KEPT = 1024


class RewardContractError(TypeError):
    """A reward answered something that is not one score a sample."""


@dataclass
class RunnerStats:
    """Counts since the runner was made.

    `unavailable` counts samples by kind of reason: ``deadline``, the exception's type name, ``not a finite
    number``, ``not applicable`` (the reward answered None) and ``declared`` (the reward itself answered
    unavailable).
    """

    samples: int = 0
    calls: int = 0
    cached: int = 0
    uncacheable: int = 0
    retries: int = 0
    invalid_output: int = 0
    unavailable: Counter[str] = field(default_factory=Counter)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))

    def as_metrics(self) -> dict[str, float]:
        """Flat numbers for a metrics log; latencies are seconds a call, over the last 1024 calls."""
        metrics: dict[str, float] = {
            "samples": self.samples,
            "calls": self.calls,
            "cached": self.cached,
            "uncacheable": self.uncacheable,
            "retries": self.retries,
            "invalid_output": self.invalid_output,
            "unavailable": sum(self.unavailable.values()),
        }
        metrics.update({f"unavailable/{kind}": count for kind, count in sorted(self.unavailable.items())})
        if self.latencies_s:
            ordered = sorted(self.latencies_s)
            metrics["latency_p50_s"] = ordered[(len(ordered) - 1) // 2]
            metrics["latency_p95_s"] = ordered[round(0.95 * (len(ordered) - 1))]
        return metrics


@dataclass(frozen=True)
class Verdict:
    """A score and, where it is unavailable, the kind it is counted under."""

    score: Score
    kind: str = ""


def _verdict(item: Any, name: str) -> Verdict:
    """Reads one answer of a reward: a Score, a real number, or None for 'not applicable'."""
    if item is None:
        return Verdict(Score.unavailable("not applicable"), "not applicable")
    if isinstance(item, Score):
        if item.status == "ok":
            return _number(item.value, item, name)
        return Verdict(item, "declared" if item.status == "unavailable" else "")
    return _number(item, None, name)


def verdicts(answers: Any, expected: int, name: str) -> list[Verdict]:
    """Reads the answers of one call; RewardContractError unless there is one a sample."""
    if not isinstance(answers, Iterable) or isinstance(answers, str | bytes | Mapping):
        raise RewardContractError(
            f"reward {name!r} answered a {type(answers).__name__} for {expected} samples; "
            f"expected a list of {expected} scores"
        )
    listed = list(answers)
    if len(listed) != expected:
        raise RewardContractError(
            f"reward {name!r} answered {len(listed)} scores for {expected} samples; "
            f"expected {expected}, one a sample and in order"
        )
    return [_verdict(answer, name) for answer in listed]


def _number(value: Any, given: Score | None, name: str) -> Verdict:
    if not isinstance(value, Real):
        raise RewardContractError(
            f"reward {name!r} answered {value!r} of type {type(value).__name__} for a sample; "
            "it must answer a Score, a plain number or None (for a tensor: tensor.tolist())"
        )
    checked = Score.ok(float(value))
    if checked.status == "unavailable":
        return Verdict(checked, "not a finite number")
    return Verdict(given if given is not None else checked)
