"""Rollouts that a resumed run reads back instead of drawing them again: finished, whole, and of the same weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlmm.train.checkpoint import file_digest, write_json_atomically
from rlmm.train.context import StageContext
from rlmm.train.faults import storing


def record_path(path: Path) -> Path:
    """Beside a rollout's file, what it was made with and its figures."""
    return path.with_suffix(".json")


def gate_settings(context: StageContext) -> dict[str, Any]:
    """What may differ when a run is resumed and decides whether a rollout passes: a stricter gate is to see it."""
    rewards = (context.recipe.rewards, context.recipe.held_out)
    failures = [part.model_dump(mode="json", include={"on_failure", "failed_share"}) for part in rewards]
    return {"gates": context.config.gates.model_dump(mode="json"), "failures": failures}


def finish(
    path: Path, weights: str, settings: Mapping[str, Any], figures: Mapping[str, float], scores: Mapping[str, Any]
) -> None:
    """Record that a rollout passed its gates. `weights`: the fingerprint of those that drew it; `settings`: see
    `gate_settings`; `scores`: what the judges were asked for it (`rlmm.train.score_cache`)."""
    record = {"weights": weights, "sha256": file_digest(path), "settings": settings, "figures": dict(figures)}
    record["scores"] = scores
    with storing(f"the record of {path.name}", record_path(path)):
        write_json_atomically(record_path(path), record)


def finished(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was recorded of a rollout that may be read back, if its `weights` are those of now; None where it has to be
    made."""
    try:
        record = json.loads(record_path(path).read_text())
        whole = record["sha256"] == file_digest(path)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if whole and record["settings"] == settings else None
