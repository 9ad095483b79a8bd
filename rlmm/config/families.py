"""What a stage may ask of a policy's family: refused when the recipe is read, with the reason."""

from collections.abc import Iterable
from typing import Literal

from rlmm.config.engines import TorchEngineConfig
from rlmm.config.masked import UnmaskingConfig
from rlmm.config.policy import NewPolicy, Policy
from rlmm.config.sampling import Sampled
from rlmm.config.stages import DpoStage, EvalStage, GrpoStage, PairsStage, SftStage, Stage
from rlmm.objectives.estimators import Estimator
from rlmm.objectives.legality import IllegalObjective, LogProbKind, check_legal
from rollouts.unmasking import check_steps

Family = Literal["next_token", "masked"]


def family_of(policy: Policy) -> Family:
    """Of a recipe's policy. A checkpoint that cannot be read counts as next-token: its loading says what is wrong."""
    if isinstance(policy, NewPolicy):
        return policy.family
    from rlmm.policies.families.loading import is_masked  # which itself reads the settings beside this file

    try:
        return "masked" if is_masked(policy) else "next_token"
    except ValueError:
        return "next_token"


def check_family(name: str, stage: Stage, policy: Policy, positions: int | None) -> None:
    """Raises ValueError where the stage asks for what the policy's family has not, or lacks what it needs.
    `positions`: of a new policy's image; None: of a checkpoint, which is not read yet."""
    family = family_of(policy)
    sampled = stage.sampling if isinstance(stage, GrpoStage | PairsStage) else stage
    stored = isinstance(stage, PairsStage) and stage.rollouts is not None
    if isinstance(sampled, Sampled) and not stored:
        place = f"{name}.sampling.unmasking" if sampled is not stage else f"{name}.unmasking"
        _check_unmasking(place, sampled.unmasking, family, positions)
        if family == "masked" and sampled.written is not None:
            raise ValueError(f"stage {name!r}: a masked policy draws images alone; leave thought and answer out")
    if isinstance(stage, PairsStage) and family == "masked":
        _check_engine(name, stage)
        if stage.judge or stage.understanding:
            raise ValueError(f"stage {name!r}: a masked policy draws images alone; leave judge and understanding out")
    if isinstance(stage, DpoStage) and family == "masked" and stage.understanding:
        raise ValueError(f"stage {name!r}: a masked policy draws images alone; leave understanding out")
    if isinstance(stage, GrpoStage):
        _check_grpo(name, stage, family)
    elif isinstance(stage, SftStage | DpoStage) and stage.noise is not None and family == "next_token":
        raise ValueError(f"stage {name!r}: noise is of masked policies, and this one is next-token; leave it out")


def check_understanding(stages: Iterable[Stage], policy: Policy) -> None:
    """Raises ValueError where an evaluation would ask a masked policy the recipe's `understanding`."""
    if family_of(policy) == "masked" and any(isinstance(stage, EvalStage) for stage in stages):
        raise ValueError("a masked policy draws images alone, and an eval stage asks it `understanding`; leave it out")


def _check_unmasking(place: str, given: UnmaskingConfig | None, family: Family, positions: int | None) -> None:
    if family == "masked" and given is None:
        raise ValueError(f"{place}: a masked policy needs it, e.g. {{steps: 8, order: random}}")
    if family == "next_token" and given is not None:
        raise ValueError(
            f"{place}: a next-token policy decides one token after the other; leave it out (of a masked checkpoint "
            "that a hub id names, name the family too: policy.family)"
        )
    if given is not None and positions is not None:
        check_steps(given.record(), positions)


def _check_grpo(name: str, stage: GrpoStage, family: Family) -> None:
    if family == "next_token":
        if stage.estimator is not None:
            raise ValueError(f"stage {name!r}: a next-token policy's log-probs are exact; leave estimator out")
        check_legal(stage.objective.objective().family, LogProbKind.EXACT)
        return
    _check_engine(name, stage)
    _check_estimator(name, stage, Estimator() if stage.estimator is None else stage.estimator.record())


def _check_engine(name: str, stage: GrpoStage | PairsStage) -> None:
    if not isinstance(stage.engine, TorchEngineConfig):
        raise ValueError(f"stage {name!r}: masked policies are sampled by engine.kind torch, not {stage.engine.kind}")


def _check_log_prob(name: str, stage: GrpoStage, kind: LogProbKind, force: bool) -> None:
    """The table of legality, and that `force` is there for something."""
    try:
        for family in stage.families:
            check_legal(family, kind)
    except IllegalObjective as error:
        if not force:
            raise ValueError(f"stage {name!r}: {error}") from error
        return
    if force:
        raise ValueError(
            f"stage {name!r}: the objective may use this log-prob, so estimator.force does nothing; leave it out"
        )


def _check_estimator(name: str, stage: GrpoStage, estimator: Estimator) -> None:
    force = stage.estimator is not None and stage.estimator.force
    unmasking, sampling = stage.sampling.unmasking, stage.sampling
    _check_log_prob(name, stage, estimator.kind, force)
    if stage.objective.level == "sequence" and (estimator.steps is not None or estimator.scheme == "truncated"):
        raise ValueError(
            f"stage {name!r}: a ratio of level sequence needs every decision, and this estimator weighs a part of "
            "them; use level: token, or leave steps out"
        )
    along = estimator.scheme == "trajectory"
    if estimator.steps is not None and unmasking is not None and estimator.steps >= unmasking.steps:
        raise ValueError(
            f"stage {name!r}: estimator.steps {estimator.steps} of the {unmasking.steps} steps an image is revealed in "
            "are all of them; set fewer, or leave steps out"
        )
    cut = sampling.top_k > 0 or sampling.top_p < 1
    if cut and (not along or (unmasking is not None and unmasking.order not in ("random", "blocks", "ancestral"))):
        raise ValueError(
            f"stage {name!r}: the supports that top_k and top_p leave are stored where a token was decided, and this "
            "log-prob needs them elsewhere too; set top_k 0 and top_p 1, or use estimator trajectory with order random"
        )
    if unmasking is not None and unmasking.order == "noisy_confidence":
        raise ValueError(
            f"stage {name!r}: what noisy_confidence samples has no known log-prob, so nothing can tell if the loss "
            "is of the law sampled from; train with order random, confidence or threshold, and evaluate with any"
        )
    if not along and stage.objective.token_weighting is not None:
        raise ValueError(
            f"stage {name!r}: objective.token_weighting is shown each token's log-prob and entropy, and of a noise "
            "scheme only a row's sum means something; leave it out, or use estimator trajectory"
        )
    order = "" if unmasking is None else unmasking.order
    sure = order in ("confidence", "threshold")
    if not estimator.order_term and not sure:
        raise ValueError(
            f"stage {name!r}: order {order} says nothing about the policy, so a log-prob has no order's term to leave "
            "out; leave estimator.order_term out, or sample with order confidence or threshold"
        )
    if sure and sampling.law((0, 1 << 31)).off_policy:
        raise ValueError(
            f"stage {name!r}: order {order} reveals what the sampled law is surest of, and under guidance "
            f"{sampling.guidance} the log-prob is of another law, whose order that is not; use guidance: guided or "
            "none, or order: random"
        )
    if along and sure and estimator.order_term and stage.objective.kl.coefficient:
        raise ValueError(
            f"stage {name!r}: with order {order} the reference can find what was revealed impossible, and the policy "
            "too after an update: a KL to it is infinite; set kl.coefficient 0, or estimator.order_term: false for a "
            "KL of the tokens alone"
        )
    if estimator.upper is not None and (stage.objective.surrogate != "reinforce" or estimator.kind != LogProbKind.ELBO):
        raise ValueError(
            f"stage {name!r}: an upper estimate has no ratio to an older one, and pairs with an ELBO; use objective "
            "reinforce and an estimator such as count or stratified, or leave upper out"
        )
    if stage.objective.mismatch is not None and estimator != Estimator():
        raise ValueError(
            f"stage {name!r}: objective.mismatch compares log-probs with the sampler's, which this estimator does not "
            "give; leave it out"
        )
