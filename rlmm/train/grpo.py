"""The GRPO stage: rollouts by an engine, scores by rewards, updates by a clipped policy gradient."""

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rlmm.config.objectives import MismatchConfig, ObjectiveConfig
from rlmm.config.stages import GrpoStage
from rlmm.objectives.estimators import Estimator, sandwiched
from rlmm.objectives.kl import bound_kl, kl_estimate, kl_loss
from rlmm.objectives.legality import LogProbKind, check_legal
from rlmm.objectives.mismatch import mismatch_weights
from rlmm.objectives.policy_gradient import POLICY_LOSSES, policy_metrics
from rlmm.objectives.token_weighting import TokenView, TokenWeighting, load_token_weighting
from rlmm.policies.base import LogProbs
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.ahead import KeepAhead
from rlmm.train.context import StageContext, run_codec, starting_policy
from rlmm.train.gates import check_mismatch, measure_mismatch
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.grpo_source import GrpoSource, corrected, estimator_of
from rlmm.train.judges import check_gold
from rlmm.train.metrics import Meter
from rlmm.train.processes import device, world
from rlmm.train.results import save_result
from rlmm.train.running import train
from rlmm.train.score_cache import KeepScores

ONE_STEP = Estimator(steps=1)
"""What the mismatch gate replays of a sample where the loss reads none of its trajectory."""


def grpo_loss(
    policy: TransformerPolicy,
    config: GrpoStage,
    model: nn.Module,
    batch: GrpoBatch,
    meter: Meter,
    weighting: TokenWeighting | None = None,
) -> Tensor:
    """sum(weight x (clipped policy loss + coefficient x KL - coefficient x entropy)) of a micro-batch; the mismatch
    gate stands before it. `weighting`: the user's factors on the weights."""
    objective, trajectory = config.objective, batch.trajectory
    sampled = _sampled_step(policy, config, batch)
    current = policy.log_probs(
        trajectory, model=model, entropy_gradient=batch.entropy_coefficient > 0, estimator=estimator_of(config)
    )
    _gate(current if sampled is None else sampled, config, batch, meter)
    # With one update a rollout the old policy is the current one: its log-probs are these, without gradient.
    old_BS = current.logp_BS.detach() if batch.old_logp_BS is None else batch.old_logp_BS
    loss = POLICY_LOSSES[objective.surrogate](
        _driving(current, config, batch),
        old_BS,
        batch.advantage,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        level=objective.level,
        target_mask_BS=trajectory.target_mask,
    )
    per_token_BS = loss.loss_BS
    if objective.mismatch is not None:
        per_token_BS = per_token_BS * _correction(objective.mismatch, old_BS, batch, meter)
    if batch.reference_logp_BS is not None:
        per_token_BS = per_token_BS + _penalty(objective, current, old_BS, batch, meter)
    if batch.entropy_coefficient:
        per_token_BS = per_token_BS - batch.entropy_coefficient * current.entropy_BS
    _meter_entropy(current, batch, meter)
    for name, (total, count) in current.figures.items():
        meter.add(name, total, count)
    for name, total in policy_metrics(loss, evaluated(current, trajectory.target_mask), batch.kept_B).items():
        meter.total(name, total)
    weight_BS = batch.weight_BS if current.scale_BS is None else batch.weight_BS * current.scale_BS
    if weighting is not None:
        weight_BS = weight_BS * _user_weights(weighting, current, old_BS, batch, meter)
    return (weight_BS * per_token_BS).sum()


def _driving(current: LogProbs, config: GrpoStage, batch: GrpoBatch) -> Tensor:
    """The log-probs that the loss moves."""
    estimator = estimator_of(config)
    if current.upper_BS is None or estimator is None or estimator.upper is None:
        return current.logp_BS
    return sandwiched(current.logp_BS, current.upper_BS, batch.advantage, estimator.upper.share)


@torch.no_grad()
def _sampled_step(policy: TransformerPolicy, config: GrpoStage, batch: GrpoBatch) -> LogProbs | None:
    """What the gate looks at where the loss reads an estimate of a likelihood: that is not what was sampled, and the
    law still must be the sampler's. Read before the loss, whose activations are not there yet; and where weights are in
    parts no forward may come between another one and its backward."""
    estimator = estimator_of(config)
    kind = policy.log_prob_kind if estimator is None else estimator.kind
    if not batch.gate or kind in (LogProbKind.EXACT, LogProbKind.TRAJECTORY):
        return None
    return policy.log_probs(batch.trajectory, model=policy.gathering, estimator=ONE_STEP)


def _gate(current: LogProbs, config: GrpoStage, batch: GrpoBatch, meter: Meter) -> None:
    if not batch.gate:
        return
    trajectory = batch.trajectory
    checked_BS = evaluated(current, trajectory.target_mask)
    found = measure_mismatch(current.logp_BS, trajectory.sampler_logp, checked_BS)
    meter.add("mismatch/mean", found.total, found.count)
    meter.add("mismatch/max", found.largest)
    check_mismatch(found, config.gates, config.precision, corrected=corrected(config.objective, trajectory))


def _user_weights(
    weighting: TokenWeighting, current: LogProbs, old_BS: Tensor, batch: GrpoBatch, meter: Meter
) -> Tensor:
    factor_BS = weighting(
        TokenView(batch.trajectory, current.logp_BS.detach(), old_BS, current.entropy_BS.detach(), batch.advantage)
    )
    counted = evaluated(current, batch.trajectory.target_mask) & batch.kept_B[:, None]
    meter.add("token_weight", float(factor_BS[counted].sum()), float(counted.sum()))
    return factor_BS


def evaluated(current: LogProbs, target_BS: Tensor) -> Tensor:
    """The decisions [B, S] that the log-probs are of, without those that were not evaluated."""
    return target_BS if current.scale_BS is None else target_BS & (current.scale_BS > 0)


def _meter_entropy(current: LogProbs, batch: GrpoBatch, meter: Meter) -> None:
    counted = evaluated(current, batch.trajectory.target_mask) & batch.kept_B[:, None]
    meter.add("entropy", float(current.entropy_BS.detach()[counted].sum()), float(counted.sum()))
    meter.put({"entropy_coefficient": batch.entropy_coefficient} if batch.entropy_coefficient else {})


def _correction(mismatch: MismatchConfig, old_BS: Tensor, batch: GrpoBatch, meter: Meter) -> Tensor:
    trajectory = batch.trajectory
    weight_BS = mismatch_weights(
        mismatch.kind,
        old_BS,
        trajectory.sampler_logp,
        trajectory.target_mask,
        low=mismatch.low,
        high=mismatch.high,
    )
    counted = trajectory.target_mask & batch.kept_B[:, None]
    meter.add("mismatch/weight", float(weight_BS[counted].sum()), float(counted.sum()))
    meter.add("mismatch/left_out", float((weight_BS[counted] == 0).sum()), float(counted.sum()))
    return weight_BS


def _penalty(objective: ObjectiveConfig, current: LogProbs, old_BS: Tensor, batch: GrpoBatch, meter: Meter) -> Tensor:
    reference, target = batch.reference_logp_BS, evaluated(current, batch.trajectory.target_mask)
    assert reference is not None, "called only with a reference"
    if batch.reference_draws_Bn is not None:
        return objective.kl.coefficient * _bound_penalty(current, batch, meter).unsqueeze(1)
    old = old_BS if objective.kl.importance_weighted else None
    penalty_BS = kl_loss(objective.kl.kind, current.logp_BS, reference, old_logp_BS=old, target_mask_BS=target)
    counted = target & batch.kept_B[:, None]
    estimate = kl_estimate("k3", current.logp_BS.detach(), reference, target_mask_BS=target)
    meter.add("kl", float(estimate[counted].sum()), float(counted.sum()))
    return objective.kl.coefficient * penalty_BS


def _bound_penalty(current: LogProbs, batch: GrpoBatch, meter: Meter) -> Tensor:
    """A row's [B], a token: each of its tokens has it, under the objective's weights."""
    assert current.draws_Bn is not None and batch.reference_draws_Bn is not None, "the config asks for both or neither"
    penalty_B = bound_kl(current.draws_Bn, batch.reference_draws_Bn, batch.trajectory.target_mask.sum(1))
    meter.add("kl", float(penalty_B.detach()[batch.kept_B].sum()), float(batch.kept_B.sum()))
    return penalty_B


def _warn(context: StageContext, policy: TransformerPolicy) -> None:
    """Say where the objective uses a log-prob that is no likelihood, or one it cannot soundly use."""
    config: GrpoStage = context.config
    estimator = estimator_of(config)
    kind = policy.log_prob_kind if estimator is None else estimator.kind
    for family in config.families:
        warning = check_legal(family, kind, force=config.estimator is not None and config.estimator.force)
        if warning is not None:
            context.say(f"warning: {warning}")


def rows_alone(config: GrpoStage) -> bool:
    """Whether of the head only the rows of image codes are trained, by these processes."""
    return config.trains_image_rows(world()[1], cuda=device().type == "cuda")


def kept_in_checkpoints(source: GrpoSource) -> list[TrainerCallback]:
    """What puts into checkpoints that Trainer does not know of."""
    scores = KeepScores(source.scores)
    return [scores] if source.ahead is None else [scores, KeepAhead(source.ahead)]


def run_grpo(context: StageContext) -> None:
    """Train from the starting policy on the recipe's prompts; leaves model/ (and adapter/) in the stage's folder."""
    config: GrpoStage = context.config
    codec = run_codec(context)
    policy = starting_policy(context, codec)
    if config.objective.kl.coefficient > 0:
        policy.freeze_reference()
    if rows_alone(config):
        policy.to(device())
        policy.train_image_rows()
    _warn(context, policy)
    given = config.objective.token_weighting
    weighting = None if given is None else load_token_weighting(given)
    check_gold(context)
    meter = Meter()
    with GrpoSource(context, policy, codec, meter) as source:
        train(
            context,
            policy.model,
            source,
            lambda model, batch, meter: grpo_loss(policy, config, model, batch, meter, weighting),
            meter,
            micro_batch_size=config.micro_batch_size,
            show=("reward/mean", "group/flat_share", "entropy", "mismatch/max", "grad_norm"),
            gradient_agreement=config.diagnostics.gradient_agreement,
            resume_fault=source.resume_fault,
            callbacks=kept_in_checkpoints(source),
        )
    save_result(context, policy, codec)
