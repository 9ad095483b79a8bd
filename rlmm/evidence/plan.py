"""What an evidence plan says. It names a recipe and, for each arm, a stage and the trials its settings are chosen from.

Phases, each a recipe run in a folder of its own: `start` (the trials of the SFT every arm grows from), `arms` (the
trials of the others, on the chosen start), and one run a training seed with what was chosen.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from rlmm.config.base import Strict, reason_of
from rlmm.config.masked import UnmaskingConfig
from rlmm.config.stages import best_of_name

START = "sft"
PlanT = TypeVar("PlanT", bound="Plan")


class Prompts(Strict):
    """A stretch of the held-out split."""

    skip: int = Field(0, ge=0)
    prompts: int = Field(256, ge=1)
    sampling_seeds: int = Field(1, ge=1)

    @property
    def places(self) -> range:
        return range(self.skip, self.skip + self.prompts)


class Arm(Strict):
    """A stage, and the settings tried on the validation prompts: each trial's values replace the stage's. `before`:
    stages that lead to it, as pairs to a dpo stage, or whole rounds; each goes on from the one before."""

    before: tuple[dict[str, Any], ...] = ()
    stage: dict[str, Any]
    trials: tuple[dict[str, Any], ...] = Field(..., min_length=1)

    def settings(self, trial: int) -> dict[str, Any]:
        """The stage's settings in one trial."""
        return {**self.stage, **self.trials[trial]}


class Plan(Strict):
    """What every plan says of the recipe it varies and of how its arms are judged."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9._-]+$")
    recipe: str
    """The recipe that data, codec, policy, rewards and the codec stage are taken from."""
    overrides: tuple[str, ...] = ()
    """key=value changes of that recipe."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 0.7, 0.4)
    judge: str
    """The held-out reward's label, e.g. tesseract."""
    metric: str = "exact"
    also: tuple[str, ...] = ()
    """Other metrics of the judge that are shown beside it, at the temperature chosen by the first."""
    unmasking: UnmaskingConfig | None = None
    """How a masked policy is evaluated."""
    validation: Prompts


class EvidencePlan(Plan):
    """A comparison fixed before it is run."""

    seeds: tuple[int, ...] = Field(..., min_length=2)
    tuning_seed: int
    test: Prompts
    start: Arm
    """The SFT that is itself the first arm, and that the other arms go on from."""
    arms: dict[str, Arm] = Field(..., min_length=1)
    best_of: int | None = Field(None, ge=2)
    """A further arm without training: of each so many samples of the start the one that the rewards like most."""

    @model_validator(mode="after")
    def _a_fair_comparison(self) -> "EvidencePlan":
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed {self.tuning_seed} is one of the seeds that are reported; choose another")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} repeat one; a seed counts once")
        shared = set(self.validation.places) & set(self.test.places)
        if shared:
            raise ValueError(f"{len(shared)} prompts are in validation and in test; move one of them with skip")
        counts = {name: len(arm.trials) for name, arm in self.all_arms.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"arms have unequal numbers of trials {counts}: the one with more would be tuned better")
        if START in self.arms:
            raise ValueError(f"{START!r} is the start's own name; give the arm another")
        return self

    @property
    def best_of_arm(self) -> str | None:
        """What the evaluation calls the best of the start's samples."""
        return None if self.best_of is None else best_of_name(START, self.best_of)

    @property
    def all_arms(self) -> dict[str, Arm]:
        """The start, then the others."""
        return {START: self.start, **self.arms}


class AblationPlan(Plan):
    """One GRPO stage, and settings of it changed one at a time; one seed, so that small differences mean little."""

    seed: int
    start: dict[str, Any]
    """The SFT stage every variant goes on from."""
    base: dict[str, Any]
    """The GRPO stage that is varied."""
    factors: dict[str, dict[str, dict[str, Any]]] = Field(..., min_length=1)
    """Factor -> the setting's label -> what it changes in `base`; {} is the base itself."""

    @model_validator(mode="after")
    def _something_to_compare(self) -> "AblationPlan":
        for factor, settings in self.factors.items():
            if len(settings) < 2:
                raise ValueError(
                    f"factor {factor!r} has {len(settings)} setting(s): nothing to compare; give two or more"
                )
        return self

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Stage name -> its settings; a setting that changes nothing is the base, trained once."""
        every = {"grpo": self.base}
        for factor, settings in self.factors.items():
            every |= {self.stage(factor, label): merged(self.base, change) for label, change in settings.items()}
        return every

    def stage(self, factor: str, label: str) -> str:
        """The stage that stands for a setting."""
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", f"{factor}-{label}")
        return name if self.factors[factor][label] else "grpo"


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it, mappings inside it too."""
    both = dict(base)
    for key, value in change.items():
        inner = both.get(key)
        both[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return both


def read_plan(path: Path, kind: type[PlanT]) -> PlanT:
    """Raises ValueError for a file that is not there, is no YAML mapping, or does not fit."""
    if not path.is_file():
        raise ValueError(f"no plan at {path}; configs/evidence and configs/ablations hold the shipped ones")
    try:
        return kind.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, e['loc'])) or 'plan'}: {reason_of(e)}" for e in error.errors()]
        raise ValueError(f"{path} is not a valid plan:\n" + "\n".join(faults)) from error
