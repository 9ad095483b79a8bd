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
    """The answer for one sample. Build it with `ok`, `unavailable` or `invalid_output`."""

    status: Status
    value: float | None = None
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def ok(value: float, **parts: float) -> "Score":
        """A finite value; a non-finite one is the judge's failure and becomes `unavailable`."""
        if not math.isfinite(value):
            return Score.unavailable(f"the reward returned {value}, which is not a finite number")
        return Score("ok", float(value), parts=parts)

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
