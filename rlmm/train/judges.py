"""Before a stage trusts its judges: they are the ones it started with, and they tell good from bad."""

import json
from collections.abc import Mapping

from rewards.compose import CompositeReward
from rlmm.config.rewards import Rewards
from rlmm.reward_process import share_served
from rlmm.rewarding import gold_results
from rlmm.train.checkpoint import write_json_atomically
from rlmm.train.context import StageContext
from rlmm.train.gates import GateError
from rlmm.train.processes import world


def bind_judges(context: StageContext, judges: dict[str, CompositeReward]) -> None:
    """Record what each judge is (model, rubric, a plug-in's source); a resumed stage must go on with the same ones."""
    path = context.folder / "judges.json"
    record = {part: {t.name: t.runner.reward.fingerprint() for t in judge.terms} for part, judge in judges.items()}
    before = json.loads(path.read_text()) if path.is_file() else record
    for part, terms in record.items():
        for name, fingerprint in terms.items():
            if before.get(part, {}).get(name) != fingerprint:
                raise ValueError(
                    f"{part}.{name} is another judge than this stage was started with ({path}): earlier steps would be "
                    "scored by one and later ones by another. Put the old one back, or give the run a new folder"
                )
    if world()[0] == 0:
        write_json_atomically(path, record)


def check_gold(context: StageContext, judges: Mapping[str, Rewards] | None = None) -> None:
    """Before training, every reward that brings a known good and a known bad sample ranks them rightly; those in
    processes of their own are started for all of the run. `judges`: by default the recipe's rewards and held-out
    judges."""
    every = {"rewards": context.recipe.rewards, "held_out": context.recipe.held_out} if judges is None else judges
    share_served(every.values())
    for part, rewards in every.items():
        for term, result in gold_results(rewards).items():
            if result is not None and not result.passed:
                raise GateError(
                    f"{part}.{term} ranks a known bad sample above a known good one: {'; '.join(result.lines)}. "
                    "Training on it would teach the opposite; look at `rlmm reward check`"
                )
