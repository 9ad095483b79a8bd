"""From a plan to the recipes that are run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlmm.config.base import nearest
from rlmm.config.recipe import OWN_POLICY, Recipe, read_recipe, validate_recipe
from rlmm.config.stages import CodecStage
from rlmm.evidence.plan import START, AblationPlan, Arm, EvidencePlan, Plan, Prompts

EVALUATION = "evaluation"


def trial_name(arm: str, trial: int) -> str:
    return f"{arm}-{trial}"


def start_trials(plan: EvidencePlan, folder: Path) -> Recipe:
    """The codec, and every trial of the start from the recipe's own policy."""
    stages = {
        trial_name(START, i): {**plan.start.settings(i), "start_from": OWN_POLICY}
        for i in range(len(plan.start.trials))
    }
    return _recipe(plan, folder / "tune-start", plan.tuning_seed, stages, plan.validation)


def arm_trials(plan: EvidencePlan, folder: Path, start: int) -> Recipe:
    """The chosen start, and every trial of the other arms from it."""
    stages = {START: {**plan.start.settings(start), "start_from": OWN_POLICY}}
    arms = [START]
    for name, arm in plan.arms.items():
        for i in range(len(arm.trials)):
            stages |= chain(trial_name(name, i), arm, i)
            arms.append(trial_name(name, i))
    return _recipe(plan, folder / "tune-arms", plan.tuning_seed, stages, plan.validation, arms, plan.best_of)


def seed_run(plan: EvidencePlan, folder: Path, seed: int, chosen: Mapping[str, int]) -> Recipe:
    """One training seed of every arm with its chosen trial, on the test prompts."""
    stages = {START: {**plan.start.settings(chosen[START]), "start_from": OWN_POLICY}}
    for name, arm in plan.arms.items():
        stages |= chain(name, arm, chosen[name])
    arms = list(plan.all_arms)
    return _recipe(plan, folder / f"seed-{seed}", seed, stages, plan.test, arms, plan.best_of)


def chain(name: str, arm: Arm, trial: int) -> dict[str, dict[str, Any]]:
    """An arm's stages in order, the last one under the arm's name: each starts from the policy before it, and a dpo
    stage learns from the pairs before it."""
    policy, pairs, stages = START, None, {}
    settings = [*arm.before, arm.settings(trial)]
    for place, stage in enumerate(settings, start=1):
        its = name if place == len(settings) else f"{name}_{place}"
        stages[its] = {**stage, "start_from": policy}
        if stage.get("kind") == "pairs":
            pairs = its
        else:
            policy = its
        if stage.get("kind") == "dpo" and "data" not in stage:
            stages[its]["pairs"] = pairs
    return stages


def ablation_run(plan: AblationPlan, folder: Path) -> Recipe:
    """The start and every variant from it, on the validation prompts."""
    stages = {START: {**plan.start, "start_from": OWN_POLICY}}
    stages |= {name: {**settings, "start_from": START} for name, settings in plan.variants.items()}
    return _recipe(plan, folder, plan.seed, stages, plan.validation)


def _recipe(
    plan: Plan,
    folder: Path,
    seed: int,
    stages: Mapping[str, Any],
    prompts: Prompts,
    arms: Sequence[str] | None = None,
    best_of: int | None = None,
) -> Recipe:
    base = read_recipe(Path(plan.recipe), list(plan.overrides))
    judges = [term.key for term in base.held_out.terms]
    if plan.judge not in judges:
        raise ValueError(f"{plan.judge!r} is no held-out judge of {plan.recipe}.{nearest(plan.judge, judges)}")
    codecs = {name: stage for name, stage in base.stages.items() if isinstance(stage, CodecStage)}
    raw = base.model_dump(mode="json")
    raw |= {"name": f"{plan.name}-{folder.name}", "seed": seed, "run_dir": str(folder)}
    raw["stages"] = {name: stage.model_dump(mode="json") for name, stage in codecs.items()} | dict(stages)
    raw["stages"][EVALUATION] = {
        "kind": "eval",
        "arms": list(stages if arms is None else arms),
        "best_of": {} if best_of is None else {START: best_of},
        "temperatures": list(plan.temperatures),
        "unmasking": plan.unmasking and plan.unmasking.model_dump(),
        **prompts.model_dump(),
    }
    return validate_recipe(raw, f"plan {plan.name}, {folder.name}")
