"""What rollouts that are drawn a step ahead ask of a stage: refused when the recipe is read, with the reason."""

from rlmm.config.engines import VllmEngineConfig
from rlmm.config.stages import GrpoStage, Stage


def check_staleness(name: str, stage: Stage) -> None:
    """Raises ValueError where the stage draws rollouts ahead and trains on them without the weights that correct for
    it, or asks for what cannot be while one is drawn."""
    if not isinstance(stage, GrpoStage) or not stage.max_staleness:
        return
    for reason in (_uncorrected(stage), _cannot_be_ahead(stage)):
        if reason is not None:
            raise ValueError(f"stage {name!r} has max_staleness {stage.max_staleness}, and {reason}")


def _uncorrected(stage: GrpoStage) -> str | None:
    objective = stage.objective
    if objective.mismatch is None:
        return (
            "its loss would take samples of older weights for its own; set objective.mismatch (kind: truncate), which "
            "weighs them by the ratio of the two"
        )
    if objective.mismatch.kind == "reject":
        return (
            "objective.mismatch.kind reject leaves rows out and weighs none, so what stays is of the older weights; "
            "use truncate or mask"
        )
    if objective.kl.coefficient and objective.kl.importance_weighted:
        return (
            "objective.kl.importance_weighted weighs by the ratio to the weights before the update, which did not draw "
            "the samples; leave it out, and use kind k2 or k3"
        )
    if stage.sampling.law((0, 1 << 31)).off_policy:
        return (
            f"with guidance {stage.sampling.guidance} the loss is of another law than the one sampled from, which the "
            "ratio would take for staleness; use guidance: guided or none"
        )
    return None


def _cannot_be_ahead(stage: GrpoStage) -> str | None:
    if stage.resample_flat:
        return (
            "resample_flat draws again once a rollout is scored, when the engine has the next one's weights; set it to "
            "0"
        )
    if stage.score_chunk is not None:
        return "score_chunk is for rollouts that are not all drawn when scoring begins, and these are; leave it out"
    if stage.deepspeed is not None:
        return "a copy of the weights is kept to draw with, which DeepSpeed may hold in parts; leave one of the two out"
    if isinstance(stage.engine, VllmEngineConfig) and stage.engine.sleep:
        return (
            "engine.sleep gives the engine's memory back between rollouts, of which one is always drawn; leave it out"
        )
    return None
