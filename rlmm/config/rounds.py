"""Rounds: stages of a recipe that are repeated, written once. They become plain stages when the recipe is read."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from rlmm.config.base import Strict, reason_of

KIND = "rounds"
REPEATED = ("pairs", "dpo", "grpo", "sft")
"""Kinds of stages that a round may have."""

_NAMED = ("start_from", "reference", "pairs", "rollouts")
"""Settings that name another stage."""


class Rounds(Strict):
    """`n` times the same stages. Stage `dpo` of round 2 becomes stage `dpo_2`."""

    kind: Literal["rounds"] = "rounds"
    n: int = Field(..., ge=1)
    stages: dict[str, dict[str, Any]] = Field(..., min_length=1)
    """In a setting of theirs a name of this round is this round's stage."""


def with_rounds(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of a recipe, plain data, with each entry of kind `rounds` replaced by its rounds, one after the other.

    What stands after them and names a stage of theirs means the last round's; an evaluation's `arms` mean every
    round's. Raises ValueError, with the place, for an entry that does not fit.
    """
    plain: dict[str, Any] = {}
    numbered: dict[str, list[str]] = {}
    for name, stage in stages.items():
        if not isinstance(stage, Mapping) or stage.get("kind") != KIND:
            plain[name] = _renamed(stage, {own: names[-1] for own, names in numbered.items()}, numbered)
            continue
        rounds = _read(name, stage)
        for own, repeated in rounds.stages.items():
            if own in stages or own in numbered:
                raise ValueError(f"stages.{name}.stages.{own}: there is another stage of this name; call it otherwise")
            if repeated.get("kind") not in REPEATED:
                raise ValueError(
                    f"stages.{name}.stages.{own}: a stage of kind {repeated.get('kind')!r} is not repeated; rounds are "
                    f"of {', '.join(REPEATED)}: put it before them or after them"
                )
        before = {own: names[-1] for own, names in numbered.items()}
        for number in range(1, rounds.n + 1):
            mine = before | {own: f"{own}_{number}" for own in rounds.stages}
            plain |= {mine[own]: _renamed(repeated, mine, {}) for own, repeated in rounds.stages.items()}
        numbered |= {own: [f"{own}_{number}" for number in range(1, rounds.n + 1)] for own in rounds.stages}
    taken = [name for names in numbered.values() for name in names if name in stages]
    if taken:
        raise ValueError(f"stages.{taken[0]}: a round's stage has this name already; call it otherwise")
    return plain


def _read(name: str, stage: Mapping[str, Any]) -> Rounds:
    try:
        return Rounds.model_validate(stage)
    except ValidationError as error:
        faults = [f"stages.{'.'.join([name, *map(str, e['loc'])])}: {reason_of(e)}" for e in error.errors()]
        raise ValueError("\n  ".join(faults)) from error


def _renamed(stage: Any, names: Mapping[str, str], every: Mapping[str, Sequence[str]]) -> Any:
    """A stage whose settings name others by their names in the recipe."""
    if not isinstance(stage, Mapping) or not names:
        return stage
    named = {key: stage[key] for key in _NAMED if isinstance(stage.get(key), str)}
    changed: dict[str, Any] = {key: names.get(value, value) for key, value in named.items()}
    arms, best_of = stage.get("arms"), stage.get("best_of")
    if isinstance(arms, Sequence) and not isinstance(arms, str):
        changed["arms"] = [one for arm in arms for one in every.get(arm, [arm])]
    if isinstance(best_of, Mapping):
        changed["best_of"] = {names.get(arm, arm): n for arm, n in best_of.items()}
    return {**stage, **changed}
