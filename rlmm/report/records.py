"""What a run folder holds, as typed records."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

log = logging.getLogger(__name__)


@dataclass
class Notes:
    """What could not be read, in the order it was met. Shown on the page and logged as warnings."""

    messages: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        log.warning(message)
        self.messages.append(message)


@dataclass(frozen=True)
class Curve:
    """One metric over steps, sorted by step; values are finite or NaN."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


class Record(BaseModel):
    """An entry of eval.json; keys beyond the declared ones are ignored, non-finite numbers refused."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


def _none_for_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


Bound = Annotated[float | None, BeforeValidator(_none_for_nan)]
"""An interval's bound; one prompt has no interval, which the evaluation writes as NaN."""


class EvalRow(Record):
    """The mean of one metric for one arm at one temperature, with its interval over prompts."""

    arm: str
    temperature: float
    judge: str
    metric: str
    mean: float
    low: Bound = None
    high: Bound = None
    n_prompts: int | None = None
    n_seeds: int | None = None
    excluded: int = 0


class Contrast(Record):
    """A paired difference, arm minus baseline, with its interval over prompts."""

    arm: str
    baseline: str
    judge: str
    metric: str
    difference: float
    low: Bound = None
    high: Bound = None
    arm_temperature: float | None = None
    baseline_temperature: float | None = None
    at: str | None = None
    """`best`: each arm at the temperature where it does best; else the temperature of both."""


class Understood(Record):
    """The mean of one metric over an arm's answers to held-out questions."""

    arm: str
    metric: str
    mean: float
    low: Bound = None
    high: Bound = None
    n: int


class Diversity(Record):
    """How different one arm's samples for the same prompt are, at one temperature."""

    arm: str
    temperature: float
    value: float


class CurvePoint(Record):
    """The expected best score of `n` samples, with its interval over prompts."""

    n: int
    mean: float
    low: float | None = None
    high: float | None = None


class BestOf(Record):
    """An evaluation arm that is the best of `n` samples of the arm `of` by the trained reward, at one temperature, and
    what that reward expects of fewer samples."""

    arm: str
    of: str
    n: int
    temperature: float
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Evaluation:
    """The contents of one eval.json."""

    rows: tuple[EvalRow, ...]
    contrasts: tuple[Contrast, ...]
    diversity: tuple[Diversity, ...]
    understood: tuple[Understood, ...] = ()
    best_of: tuple[BestOf, ...] = ()
    compute_notes: tuple[str, ...] = ()
    """What each arm's training took, and whether it is comparable."""


@dataclass(frozen=True)
class Stage:
    """One folder under stages/. `gates` maps a metric to the ceiling past which the run would stop."""

    folder: Path
    name: str
    kind: str
    status: str
    started: datetime | None
    finished: datetime | None
    curves: Mapping[str, Curve]
    gates: Mapping[str, float]
    evaluation: Evaluation | None
    samples: Path | None
    answers: Path | None
    reference: Path | None
    rollouts: tuple[Path, ...]
    reconstruction: Path | None

    @property
    def last_step(self) -> int | None:
        """The highest step that any metric was logged at."""
        return max((curve.steps[-1] for curve in self.curves.values() if curve.steps), default=None)


@dataclass(frozen=True)
class Run:
    """A run folder as far as it has come."""

    folder: Path
    config: Mapping[str, Any] | None
    config_text: str | None
    environment: Mapping[str, Any] | None
    stages: tuple[Stage, ...]
    notes: Notes
