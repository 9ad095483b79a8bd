"""Several rewards made into one: a transform and a weight each, a way to combine them, and a gate."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rewards.base import Sample, Score
from rewards.failures import FailurePolicy
from rewards.names import nearest
from rewards.runner import RewardContractError, RewardRunner
from rewards.transforms import IN_GROUP, GroupTransform, Transform, by_group, identity, zscores

CreditSpan = Literal["all", "text", "image"]
Mode = Literal["weighted_sum", "product", "geometric_mean", "min"]
POWERS: tuple[Mode, ...] = ("product", "geometric_mean")
"""Modes in which a weight is an exponent."""


@dataclass(frozen=True)
class Term:
    """One reward within a composite. A term of weight 0 is scored and logged, and does not count. `parts`: weights of
    the score's parts, `value` among them, whose sum is the raw value; empty for the value alone. `in_group`: what
    happens to the transformed values among those of their group. `span`: whose tokens earn it. `steps`: each token
    earns the values of the steps that end after it."""

    name: str
    runner: RewardRunner
    weight: float = 1.0
    transform: Transform = identity
    parts: Mapping[str, float] = field(default_factory=dict)
    in_group: GroupTransform = ""
    span: CreditSpan = "all"
    steps: bool = False

    def transformed(self, score: Score) -> list[tuple[float, float]]:
        """(end, transformed value) of a score's steps. Raises RewardContractError for a score without any."""
        if not score.steps:
            raise RewardContractError(
                f"reward term {self.name!r} is earned step by step, and its reward gave no steps; answer with "
                "Score.stepwise(values), or leave `steps` out of the term"
            )
        return [(end, self.transform(value)) for end, value in score.steps]


@dataclass(frozen=True)
class Gate:
    """Where the raw value of the term `term` is below `threshold`, the total is `floor`."""

    term: str
    threshold: float
    floor: float = 0.0


@dataclass(frozen=True)
class Credit:
    """A part of a total that one span's tokens earn: as a whole, or by (end, value) of its steps."""

    span: CreditSpan
    value: float
    steps: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Scored:
    """The total a sample is trained on, and every term's raw score for the log.

    `credits`: the total by who earns it, one for each of the composite's `channels`; empty where all tokens earn all,
    and where no term but a gate or a failure made the total.
    """

    total: Score
    terms: Mapping[str, Score]
    credits: tuple[Credit, ...] = ()


class CompositeReward:
    """Scores samples with every term and combines the results.

    With v the transformed values and w the weights of the terms that count (weight not 0):

    - ``weighted_sum``: sum of w * v (weights are used as given, not normalised).
    - ``product``: prod v ** w; v >= 0, and all w > 0.
    - ``geometric_mean``: the weighted one, prod v ** (w / sum w); v >= 0, and all w > 0.
    - ``min``: the smallest v (weights only switch terms on and off).

    A total is invalid output when any counting term is, else unavailable when any counting term is; the
    reason names the term. A gate's term counts for this even at weight 0. Where several gates are below their
    thresholds, the lowest floor is the total.

    `failures`: how many samples may be without a total, which whoever scores a rollout in parts holds the whole to.
    `normalise_terms`: each term is normalised in its group before the sum (GDPO, arXiv 2601.05242), not the sum
    after it. Whatever looks at a group looks at those of its members alone that have a value from every term and pass
    every gate.

    Where a term is earned by one span's tokens, or step by step, a total is also given as `credits`, whose values add
    up to it: that needs mode weighted_sum.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        mode: Mode = "weighted_sum",
        gates: Sequence[Gate] = (),
        normalise_terms: bool = False,
        failures: FailurePolicy | None = None,
    ) -> None:
        names = [term.name for term in terms]
        if len(set(names)) != len(names):
            raise ValueError(f"reward terms need different names, got {', '.join(names)}")
        if not any(term.weight for term in terms):
            raise ValueError(f"no reward term has a weight other than 0 (terms: {', '.join(names) or 'none'})")
        if mode in POWERS and any(term.weight < 0 for term in terms):
            raise ValueError(f"mode {mode} has weights as exponents and takes no negative one")
        if normalise_terms and mode != "weighted_sum":
            raise ValueError(f"terms that are normalised in their group are summed; mode {mode} is for other scales")
        if missing := [gate.term for gate in gates if gate.term not in names]:
            raise ValueError(f"the gate's term {missing[0]!r} is not a reward term. {nearest(missing[0], names)}")
        self.terms = tuple(terms)
        self.mode: Mode = mode
        self.gates = tuple(gates)
        self.normalise_terms = normalise_terms
        self.failures = failures or FailurePolicy()
        self._check_credits()

    @property
    def channels(self) -> tuple[tuple[CreditSpan, str], ...]:
        """(span, name) of what is earned apart: one a span, and one a term that is earned step by step, whose name it
        has. Empty where every token earns the total."""
        counting = [term for term in self.terms if term.weight]
        found = tuple(dict.fromkeys((term.span, term.name if term.steps else "") for term in counting))
        return () if found == (("all", ""),) else found

    def _check_credits(self) -> None:
        if self.channels and self.mode != "weighted_sum":
            raise ValueError(
                f"terms of one span, or of steps, add up to a total, and mode {self.mode} makes it otherwise; use "
                "weighted_sum"
            )
        for term in self.terms:
            if term.steps and (term.parts or term.in_group or self.normalise_terms):
                raise ValueError(
                    f"reward term {term.name!r} is earned step by step: its steps have no parts, and are not ranked or "
                    "normalised in a group before they are summed; leave these out"
                )

    def score(self, samples: Sequence[Sample]) -> list[Scored]:
        """One Scored a sample, in order; `samples` are whole groups. Raises what RewardRunner.score raises."""
        by_term = {term.name: term.runner.score(samples) for term in self.terms}
        rows = [{name: column[at] for name, column in by_term.items()} for at in range(len(samples))]
        settled = [self._settled(scores) for scores in rows]
        open_rows = [at for at, total in enumerate(settled) if total is None]
        made = dict(zip(open_rows, self._combined([(samples[at].group_id, rows[at]) for at in open_rows]), strict=True))
        made |= {at: (total, ()) for at, total in enumerate(settled) if total is not None}
        return [Scored(made[at][0], rows[at], made[at][1]) for at in range(len(samples))]

    def checked(self, samples: Sequence[Sample]) -> list[Scored]:
        """`score`, held to the failure policy. Raises RewardFailureError, too, where too many samples have no score."""
        scored = self.score(samples)
        self.failures.check([one.total for one in scored])
        return scored

    def _settled(self, scores: Mapping[str, Score]) -> Score | None:
        """The total of a sample that some term has no value for, or that a gate shuts out; None for the others."""
        gating = {gate.term for gate in self.gates}
        counting = [term for term in self.terms if term.weight or term.name in gating]
        for status, make in (("invalid_output", Score.invalid_output), ("unavailable", Score.unavailable)):
            for term in counting:
                if scores[term.name].status == status:
                    return make(f"{term.name}: {scores[term.name].reason}")
        shut = [gate.floor for gate in self.gates if _value(scores[gate.term]) < gate.threshold]
        return Score.ok(min(shut)) if shut else None

    def _combined(self, rows: Sequence[tuple[str, Mapping[str, Score]]]) -> list[tuple[Score, tuple[Credit, ...]]]:
        """The totals, and who earns them, of (group, its scores) rows that have a value from every term."""
        groups = [group for group, _ in rows]
        counting = [term for term in self.terms if term.weight]
        columns = [self._column(term, groups, [scores[term.name] for _, scores in rows]) for term in counting]
        found = []
        for at, (_, scores) in enumerate(rows):
            values = {term.name: column[at] for term, column in zip(counting, columns, strict=True)}
            total = combine([(term.name, term.weight, values[term.name]) for term in counting], self.mode)
            found.append((total, self._credits(counting, values, scores)))
        return found

    def _credits(
        self, counting: Sequence[Term], values: Mapping[str, float], scores: Mapping[str, Score]
    ) -> tuple[Credit, ...]:
        by_name, found = {term.name: term for term in counting}, []
        for span, name in self.channels:
            mine = [by_name[name]] if name else [term for term in counting if term.span == span and not term.steps]
            steps = by_name[name].transformed(scores[name]) if name else []
            weighed = tuple((end, by_name[name].weight * value) for end, value in steps)
            found.append(Credit(span, math.fsum(term.weight * values[term.name] for term in mine), weighed))
        return tuple(found)

    def _column(self, term: Term, groups: Sequence[str], scores: Sequence[Score]) -> list[float]:
        if term.steps:
            return [math.fsum(value for _, value in steps) / len(steps) for steps in map(term.transformed, scores)]
        values = [term.transform(raw(term, score)) for score in scores]
        values = by_group(groups, values, IN_GROUP[term.in_group])
        return by_group(groups, values, zscores) if self.normalise_terms else values


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
                f"{name}: {value} is negative and can be no factor of a {mode}; give the term an affine transform"
            )
    total = math.fsum(weight for _, weight, _ in weighted) if mode == "geometric_mean" else 1.0
    return Score.ok(math.prod(value ** (weight / total) for _, weight, value in weighted))
