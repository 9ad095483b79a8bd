"""Runs a plan: tune the start, tune the arms, then every seed. A second call goes on where the first one stopped."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlmm.config.recipe import Recipe
from rlmm.evidence.pages import write_pages
from rlmm.evidence.plan import START, EvidencePlan
from rlmm.evidence.recipes import arm_trials, seed_run, start_trials
from rlmm.evidence.results import Chosen, choose, choose_best_of, evaluation, result_record, scores
from rlmm.pipeline import run_recipe
from rlmm.run_folder import RunFolder, environment
from rlmm.train.checkpoint import write_json_atomically

Say = Callable[[str], None]


def run_plan(plan: EvidencePlan, folder: Path, out: Path, say: Say) -> dict[str, Any]:
    """Run what is not done yet under `folder`; write `<name>.json`, its table and its plot to `out`."""
    progress = _Progress(say, 2 + len(plan.seeds))
    first = scores(evaluation(progress.run("trials of the start", start_trials(plan, folder))), plan)
    chosen = {START: choose(first, START, len(plan.start.trials), plan.temperatures)}
    trials = arm_trials(plan, folder, chosen[START].trial)
    tuned = scores(evaluation(progress.run("trials of the arms", trials)), plan)
    chosen |= {name: choose(tuned, name, len(arm.trials), plan.temperatures) for name, arm in plan.arms.items()}
    chosen |= choose_best_of(tuned, plan, chosen[START])
    for name, one in chosen.items():
        say(_choice_line(plan, name, one))
    picked = {name: one.trial for name, one in chosen.items()}
    runs = [evaluation(progress.run(f"seed {seed}", seed_run(plan, folder, seed, picked))) for seed in plan.seeds]
    record = result_record(plan, chosen, {**first, **tuned}, runs, environment())
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomically(out / f"{plan.name}.json", record)
    write_pages(record, out)
    return record


def _choice_line(plan: EvidencePlan, name: str, one: Chosen) -> str:
    settings = plan.all_arms.get(name, plan.start).trials[one.trial]
    return f"{name}: {settings} at temperature {one.temperature:g} ({plan.metric} {one.score:.3f} on validation)"


class _Progress:
    """Says which run of how many it is, and how long the rest may take."""

    def __init__(self, say: Say, runs: int) -> None:
        self.say, self.runs, self.done, self.begun = say, runs, 0, time.monotonic()

    def run(self, what: str, recipe: Recipe) -> RunFolder:
        spent = time.monotonic() - self.begun
        left = f", about {spent / self.done * (self.runs - self.done) / 60:.0f} min left" if self.done else ""
        self.say(f"evidence run {self.done + 1} of {self.runs}: {what}{left}")
        folder = run_recipe(recipe, self.say)
        self.done += 1
        return folder
