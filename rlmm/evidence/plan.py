"""What an evidence plan says. It names a recipe and, for each arm, a stage and the trials its settings are chosen from.

Phases, each a recipe run in a folder of its own: `start` (the trials of the SFT every arm grows from), `arms` (the
trials of the others, on the chosen start), and one run a training seed with what was chosen.
"""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from rlmm.config.base import Strict

START = "sft"


class Prompts(Strict):
    """A stretch of the held-out split."""

    skip: int = Field(0, ge=0)
    prompts: int = Field(256, ge=1)
    sampling_seeds: int = Field(1, ge=1)

    @property
    def places(self) -> range:
        return range(self.skip, self.skip + self.prompts)


class Arm(Strict):
    """A stage, and the settings tried on the validation prompts: each trial's values replace the stage's."""

    stage: dict[str, Any]
    trials: tuple[dict[str, Any], ...] = Field(..., min_length=1)

    def settings(self, trial: int) -> dict[str, Any]:
        """The stage's settings in one trial."""
        return {**self.stage, **self.trials[trial]}


class EvidencePlan(Strict):
    """A comparison fixed before it is run."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9._-]+$")
    recipe: str
    """The recipe that data, codec, policy, rewards and the codec stage are taken from."""
    overrides: tuple[str, ...] = ()
    """key=value changes of that recipe."""
    seeds: tuple[int, ...] = Field(..., min_length=2)
    tuning_seed: int
    validation: Prompts
    test: Prompts
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 0.7, 0.4)
    judge: str
    """The held-out reward's label, e.g. tesseract."""
    metric: str = "exact"
    start: Arm
    """The SFT that is itself the first arm, and that the other arms go on from."""
    arms: dict[str, Arm] = Field(..., min_length=1)

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
    def all_arms(self) -> dict[str, Arm]:
        """The start, then the others."""
        return {START: self.start, **self.arms}


def read_plan(path: Path) -> EvidencePlan:
    """Raises ValueError for a file that is not there, is no YAML mapping, or does not fit."""
    if not path.is_file():
        raise ValueError(f"no evidence plan at {path}; configs/evidence holds the shipped ones")
    try:
        return EvidencePlan.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    except ValidationError as error:
        faults = [
            f"  {'.'.join(str(p) for p in e['loc']) or 'plan'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ValueError(f"{path} is not a valid evidence plan:\n" + "\n".join(faults)) from error
