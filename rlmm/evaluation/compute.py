"""What each arm of an evaluation cost to train, so that a difference can be held against its price."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlmm.config.stages import DpoStage, PairsStage, PolicyStage
from rlmm.train.context import StageContext, parent
from rlmm.train.metrics import MetricsFile

EQUAL = 0.8
"""Two arms had equal compute where the cheaper one's seconds are at least this share of the dearer one's."""

MONITORING = "time/held_out"
"""Watching a run by the held-out judge is no training."""


def compute(context: StageContext, arm: str) -> dict[str, Any]:
    """What an arm's training took beyond codec and data: steps and seconds (rollouts and rewards included), summed
    along the stages it grew from."""
    chain = _grew_from(context, arm)
    steps, seconds = 0, 0.0
    for name in chain:
        rows = MetricsFile(context.run.stage(name) / "metrics.jsonl").read()
        steps += len(rows) if isinstance(context.recipe.stages[name], PolicyStage) else 0
        seconds += sum(
            value
            for row in rows
            for key, value in row.items()
            if key.startswith("time/") and key != MONITORING and value
        )
    return {"arm": arm, "stages": chain, "steps": steps, "seconds": round(seconds, 1)}


def _grew_from(context: StageContext, arm: str) -> list[str]:
    """The stages that an arm took, in order: what it started from, and whose pairs or rollouts it learned from."""
    found: set[str] = set()
    waiting: list[str | None] = [arm]
    while waiting:
        name = waiting.pop()
        if name is None or name in found:
            continue
        found.add(name)
        stage = context.recipe.stages[name]
        stored = stage.rollouts if isinstance(stage, PairsStage) else None
        waiting.append(stored or parent(replace(context, name=name, config=stage)))
        waiting.append(stage.pairs if isinstance(stage, DpoStage) else None)
    return [name for name in context.recipe.stages if name in found]


def compute_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What each arm took, and whether the arms that grew from the first one had the same on top of it."""
    lines = [f"{row['arm']}: {' + '.join(row['stages'])}, {row['steps']} steps, {row['seconds']:g} s" for row in rows]
    start, *others = rows
    extra = {row["arm"]: row["seconds"] - start["seconds"] for row in others if start["arm"] in row["stages"]}
    dearest = max(extra, key=lambda arm: extra[arm], default="")
    return lines + [
        f"beyond {start['arm']}, {arm} had {share:.2f} of {dearest}'s compute: "
        + ("equal" if share >= EQUAL else "NOT equal, so their difference is also one of compute; match its steps")
        for arm in extra
        if arm != dearest and extra[dearest] > 0
        for share in [max(extra[arm], 0.0) / extra[dearest]]
    ]
