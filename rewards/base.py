"""What a reward sees and what it may answer.

A reward looks at a `Sample` and answers a `Score`. A score is a finite float, or one of two kinds of failure
that must never be mixed up: *unavailable* (the judge failed: the sample leaves its group's statistics and
gets no gradient) and *invalid output* (the policy made something that cannot be judged: a configured
penalty). Nothing here turns a failure into a number.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image

Status = Literal["ok", "unavailable", "invalid_output"]


@dataclass(frozen=True)
class Sample:
    """One generated sample, as every reward sees it.

    `row` holds the data row's columns (minus prompt, images and reference texts) exactly as they were read.
    `text` is what the policy wrote, `target_texts` what it might rightly have written.
    """

    sample_id: str
    group_id: str
    prompt: str
    images: tuple[Image.Image, ...] = ()
    text: str = ""
    source_images: tuple[Image.Image, ...] = ()
    target_images: tuple[Image.Image, ...] = ()
    target_texts: tuple[str, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The answer for one sample. Build it with `ok`, `stepwise`, `unavailable` or `invalid_output`.

    `steps`: (end, value) of a response's steps, where the reward judges them one by one; see `stepwise`.
    """

    status: Status
    value: float | None = None
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[tuple[float, float], ...] = ()

    @staticmethod
    def ok(value: float, **parts: float) -> "Score":
        """A finite value; a non-finite one is the judge's failure and becomes `unavailable`."""
        if not math.isfinite(value):
            return Score.unavailable(f"the reward returned {value}, which is not a finite number")
        return Score("ok", float(value), parts=parts)

    @staticmethod
    def stepwise(values: Sequence[float], ends: Sequence[float] | None = None) -> "Score":
        """Values of a response's steps, in order; their mean is the score's value. `ends`: what share of the response
        is decided when each step ends, rising to at most 1; None: steps of equal length.

        A value that is not finite is the judge's failure, as in `ok`. Raises ValueError for no values, and for ends
        that are no such shares.
        """
        given = [(at + 1) / len(values) for at in range(len(values))] if ends is None else list(ends)
        rising = all(a < b for a, b in zip([0.0, *given], given, strict=False))
        if not values or len(given) != len(values) or not rising or given[-1] > 1:
            raise ValueError(
                f"{len(values)} values of steps that end at {given}: give one share of the response for each value, "
                "rising, above 0 and at most 1"
            )
        score = Score.ok(math.fsum(values) / len(values))
        pairs = tuple((float(end), float(value)) for end, value in zip(given, values, strict=True))
        return score if score.value is None else Score("ok", score.value, steps=pairs)

    @staticmethod
    def unavailable(reason: str) -> "Score":
        """The judge failed; the sample is excluded from its group and gets no gradient."""
        return Score("unavailable", reason=reason)

    @staticmethod
    def invalid_output(reason: str) -> "Score":
        """The policy's output cannot be judged; it gets the recipe's configured penalty."""
        return Score("invalid_output", reason=reason)


@runtime_checkable
class Reward(Protocol):
    """A scorer. `score` answers one `Score` a sample, in order; it may raise, and the runner deals with
    that.
    """

    name: str

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]: ...

    def fingerprint(self) -> str:
        """Identity of the judge (model, revision, rubric, settings): part of the cache key and of the run's
        record.
        """
        ...


@runtime_checkable
class SeesGroups(Protocol):
    """A reward whose score of a sample depends on the samples of its group: who ranks it, or looks for copies. Each
    call has all samples of every group in it, one group after the other, and its scores are never cached.
    """

    whole_groups: Literal[True]
