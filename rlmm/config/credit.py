"""What rewards that some tokens earn and others do not ask of a stage: refused when the recipe is read."""

from rlmm.config.rewards import Rewards, RewardTerm
from rlmm.config.stages import GrpoStage, Stage


def check_credit(name: str, stage: Stage, rewards: Rewards) -> None:
    """Raises ValueError where a stage has no tokens that a term is for, or a loss without a token's own advantage."""
    if not isinstance(stage, GrpoStage):
        return
    for term in rewards.apart:
        reason = _without_tokens(stage, term) or _unfit(stage) or (_no_steps(stage) if term.steps else None)
        if reason is not None:
            setting = "steps" if term.steps else f"span {term.span}"
            raise ValueError(f"stage {name!r}: reward term {term.key!r} has {setting}, and {reason}")


def check_held_out_credit(held_out: Rewards) -> None:
    """Raises ValueError where a held-out judge says whose tokens earn it."""
    if held_out.apart:
        raise ValueError(
            f"held_out term {held_out.apart[0].key!r} has span or steps, which say what a term trains, and a held-out "
            "one trains nothing; leave them out"
        )


def _without_tokens(stage: GrpoStage, term: RewardTerm) -> str | None:
    if term.span == "text" and stage.sampling.written is None:
        return "this stage writes no text; use span image or all, or set sampling.thought or sampling.answer"
    if term.span == "image" and stage.sampling.answer is not None:
        return "with sampling.answer no image is drawn; use span text or all"
    return None


def _unfit(stage: GrpoStage) -> str | None:
    if stage.objective.level == "sequence":
        return "a ratio of level sequence has one advantage a row; use an objective of level token"
    if stage.estimator is not None and stage.estimator.kind != "trajectory":
        return "of a noise scheme only a row's sum means something; use estimator trajectory"
    if stage.resample_flat:
        return "resample_flat looks at totals, which can be flat where a part is not; set it to 0"
    if stage.objective.token_weighting is not None:
        return "a token weighting is told one advantage a row; leave objective.token_weighting out"
    return None


def _no_steps(stage: GrpoStage) -> str | None:
    settings = stage.objective.advantage
    if settings.baseline != "mean" or settings.scale == "batch_std" or settings.clip is not None:
        return (
            "steps are held against the mean and the spread of all steps in their group; use objective.advantage with "
            "baseline mean, scale group_std or none, and no clip"
        )
    return None
