"""The live alarm of a GRPO stage: frozen samples are scored again on a schedule, and a judge that drifts is seen."""

import json
from collections.abc import Sequence
from pathlib import Path

from rewards.base import Sample
from rewards.canary import Canaries, frozen, scores_of
from rewards.compose import Term
from rlmm.config.stages import GrpoStage
from rlmm.train.checkpoint import write_json_atomically
from rlmm.train.gates import GateError
from rlmm.train.heart import phase
from rlmm.train.processes import in_first

FILE = "canaries.json"


def canary_figures(
    folder: Path, config: GrpoStage, terms: Sequence[Term], rollout: int, samples: Sequence[Sample]
) -> dict[str, float]:
    """Every `canary_every` rollouts, how far the scores of the canaries have moved; nothing in other rollouts.

    The first process freezes `canary_prompts` groups of its first rollout in the stage's folder, where a resumed run
    finds them, and asks all terms about them, past any cache. Raises GateError past `gates.canary_drift`.
    """
    if not config.canary_every or rollout % config.canary_every:
        return {}
    with phase("canaries", patient=True):
        figures = in_first(lambda: _look(folder / FILE, config, terms, samples))
    _check(figures, config)
    return figures


def _look(path: Path, config: GrpoStage, terms: Sequence[Term], samples: Sequence[Sample]) -> dict[str, float]:
    if path.is_file():
        canaries = Canaries.read(json.loads(path.read_text()))
        now = scores_of(terms, canaries.samples)
    else:
        canaries = _freeze(path, config, terms, samples)
        now = canaries.first
    drift = canaries.drift(now)
    figures = {f"canary/{name}/change": found.largest for name, found in drift.items()}
    return figures | {
        "canary/drift": max(found.spreads for found in drift.values()),
        "canary/failed_share": max(found.failed for found in drift.values()),
    }


def _freeze(path: Path, config: GrpoStage, terms: Sequence[Term], samples: Sequence[Sample]) -> Canaries:
    chosen = frozen(samples, config.canary_prompts)
    if not chosen:
        raise ValueError(
            "no group of the rollout can be kept as canaries: a picture does not decode, or a row holds what has no "
            "JSON; drop such columns from the data, or set canary_every to 0"
        )
    made = Canaries(chosen, scores_of(terms, chosen))
    write_json_atomically(path, made.record())
    return made


def _check(figures: dict[str, float], config: GrpoStage) -> None:
    limit = config.gates.canary_drift
    if limit is None or figures["canary/drift"] <= limit:
        return
    changes = {name.split("/")[1]: value for name, value in figures.items() if name.endswith("/change") and value}
    listed = ", ".join(f"{name} by up to {value:.3g}" for name, value in changes.items())
    raise GateError(
        f"the scores of samples that do not change have moved by {figures['canary/drift']:.3g} of their spread (limit "
        f"{limit:g}): {listed}. The judge is another than when the stage began: look at its server, model and "
        "template. Raise gates.canary_drift if a judge of yours is that noisy"
    )
