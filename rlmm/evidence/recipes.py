"""From a plan to the recipes that are run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlmm.config.base import nearest
from rlmm.config.recipe import OWN_POLICY, Recipe, read_recipe, validate_recipe
from rlmm.config.stages import CodecStage
from rlmm.evidence.plan import START, AblationPlan, EvidencePlan, Plan, Prompts

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
    for name, arm in plan.arms.items():
        for i in range(len(arm.trials)):
            stages[trial_name(name, i)] = {**arm.settings(i), "start_from": START}
    return _recipe(plan, folder / "tune-arms", plan.tuning_seed, stages, plan.validation)


def seed_run(plan: EvidencePlan, folder: Path, seed: int, chosen: Mapping[str, int]) -> Recipe:
    """One training seed of every arm with its chosen trial, on the test prompts."""
    stages = {START: {**plan.start.settings(chosen[START]), "start_from": OWN_POLICY}}
    for name, arm in plan.arms.items():
        stages[name] = {**arm.settings(chosen[name]), "start_from": START}
    return _recipe(plan, folder / f"seed-{seed}", seed, stages, plan.test)


def ablation_run(plan: AblationPlan, folder: Path) -> Recipe:
    """The start and every variant from it, on the validation prompts."""
    stages = {START: {**plan.start, "start_from": OWN_POLICY}}
    stages |= {name: {**settings, "start_from": START} for name, settings in plan.variants.items()}
    return _recipe(plan, folder, plan.seed, stages, plan.validation)


def _recipe(plan: Plan, folder: Path, seed: int, stages: Mapping[str, Any], prompts: Prompts) -> Recipe:
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
        "arms": list(stages),
        "temperatures": list(plan.temperatures),
        "unmasking": plan.unmasking and plan.unmasking.model_dump(),
        **prompts.model_dump(),
    }
    return validate_recipe(raw, f"plan {plan.name}, {folder.name}")
