"""Several rewards made into one: a transform and a weight each, a way to combine them, and a gate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from rewards.base import Sample, Score
from rewards.names import nearest
from rewards.runner import RewardContractError, RewardRunner

Mode = Literal["weighted_sum", "product", "min"]


class Transform(Protocol):
    """Maps a finite raw value to the scale on which terms are combined."""

    def __call__(self, value: float) -> float: ...


def identity(value: float) -> float:
    """The raw value."""
    return value


@dataclass(frozen=True)
class Affine:
    """Maps `lo` to 0 and `hi` to 1 and clips to [0, 1]. With hi < lo, a lower raw value is the better one."""

    lo: float
    hi: float

    def __post_init__(self) -> None:
        if self.lo == self.hi or not (math.isfinite(self.lo) and math.isfinite(self.hi)):
            raise ValueError(f"affine needs two different finite ends, got lo={self.lo}, hi={self.hi}")

    def __call__(self, value: float) -> float:
        return min(1.0, max(0.0, (value - self.lo) / (self.hi - self.lo)))


@dataclass(frozen=True)
class Term:
    """One reward within a composite. A term of weight 0 is scored and logged, and does not count. `parts`: weights of
    the score's parts, `value` among them, whose sum is the raw value; empty for the value alone."""

    name: str
    runner: RewardRunner
    weight: float = 1.0
    transform: Transform = identity
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """Where the raw value of the term `term` is below `threshold`, the total is `floor`."""

    term: str
    threshold: float
    floor: float = 0.0


@dataclass(frozen=True)
class Scored:
    """The total a sample is trained on, and every term's raw score for the log."""

    total: Score
    terms: Mapping[str, Score]


class CompositeReward:
    """Scores samples with every term and combines the results.

    With v the transformed values and w the weights of the terms that count (weight not 0):

    - ``weighted_sum``: sum of w * v (weights are used as given, not normalised).
    - ``product``: the weighted geometric mean, prod v ** (w / sum w); v >= 0, and all w > 0.
    - ``min``: the smallest v (weights only switch terms on and off).

    A total is invalid output when any counting term is, else unavailable when any counting term is; the
    reason names the term. A gate's term counts for this even at weight 0. Where several gates are below their
    thresholds, the lowest floor is the total.
    """

    def __init__(self, terms: Sequence[Term], mode: Mode = "weighted_sum", gates: Sequence[Gate] = ()) -> None:
        names = [term.name for term in terms]
        if len(set(names)) != len(names):
            raise ValueError(f"reward terms need different names, got {', '.join(names)}")
        if not any(term.weight for term in terms):
            raise ValueError(f"no reward term has a weight other than 0 (terms: {', '.join(names) or 'none'})")
        if mode == "product" and any(term.weight < 0 for term in terms):
            raise ValueError("mode product is a weighted geometric mean and takes no negative weight")
        if missing := [gate.term for gate in gates if gate.term not in names]:
            raise ValueError(f"the gate's term {missing[0]!r} is not a reward term. {nearest(missing[0], names)}")
        self.terms = tuple(terms)
        self.mode: Mode = mode
        self.gates = tuple(gates)

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        """One Scored a sample, in order. Raises what RewardRunner.score raises."""
        by_term = {term.name: term.runner.score(samples) for term in self.terms}
        scored: list[Scored] = []
        for index in range(len(samples)):
            scores = {name: column[index] for name, column in by_term.items()}
            scored.append(Scored(self._total(scores), scores))
        return scored

    def _total(self, scores: Mapping[str, Score]) -> Score:
        gating = {gate.term for gate in self.gates}
        counting = [term for term in self.terms if term.weight or term.name in gating]
        for status, make in (("invalid_output", Score.invalid_output), ("unavailable", Score.unavailable)):
            for term in counting:
                if scores[term.name].status == status:
                    return make(f"{term.name}: {scores[term.name].reason}")
        values = {term.name: _value(scores[term.name]) for term in counting}
        if shut := [gate.floor for gate in self.gates if values[gate.term] < gate.threshold]:
            return Score.ok(min(shut))
        weighted = [
            (term.name, term.weight, term.transform(raw(term, scores[term.name]))) for term in self.terms if term.weight
        ]
        return combine(weighted, self.mode)


def raw(term: Term, score: Score) -> float:
    """The term's raw value of a score that is ok. Raises RewardContractError for a part the reward does not give."""
    if not term.parts:
        return _value(score)
    given = {**score.parts, "value": _value(score)}
    if unknown := [part for part in term.parts if part not in given]:
        raise RewardContractError(
            f"reward term {term.name!r} asks for the part {unknown[0]!r}, which its score does not have. "
            f"{nearest(unknown[0], given)}"
        )
    return math.fsum(weight * given[part] for part, weight in term.parts.items())


def _value(score: Score) -> float:
    """The value of a score that is known to be ok."""
    assert score.value is not None, "an ok score has a value"
    return score.value


def combine(weighted: Sequence[tuple[str, float, float]], mode: Mode) -> Score:
    """Combines (name, weight, transformed value) triples; formulas in CompositeReward."""
    if mode == "min":
        return Score.ok(min(value for _, _, value in weighted))
    if mode == "weighted_sum":
        return Score.ok(math.fsum(weight * value for _, weight, value in weighted))
    for name, _, value in weighted:
        if value < 0:
            return Score.unavailable(
                f"{name}: {value} is negative and has no geometric mean; give the term an affine transform"
            )
    total = math.fsum(weight for _, weight, _ in weighted)
    return Score.ok(math.prod(value ** (weight / total) for _, weight, value in weighted))
