"""The GRPO stage: rollouts by an engine, scores by rewards, updates by a clipped policy gradient."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlmm.codecs import Codec
from rlmm.config.objectives import MismatchConfig, ObjectiveConfig
from rlmm.config.stages import GrpoStage
from rlmm.data import Dataset
from rlmm.objectives.kl import kl_estimate, kl_loss
from rlmm.objectives.mismatch import mismatch_weights
from rlmm.objectives.policy_gradient import POLICY_LOSSES, policy_metrics
from rlmm.objectives.weights import Totals, count_totals, token_weights
from rlmm.policies.causal import CausalPolicy
from rlmm.rewarding import build_composite
from rlmm.seeds import generator
from rlmm.train import experience as phases
from rlmm.train.context import StageContext, load_split, run_codec, starting_policy
from rlmm.train.engines import build_engine
from rlmm.train.experience import Experience, Timed
from rlmm.train.gates import check_mismatch, check_shares, measure_mismatch
from rlmm.train.judges import bind_judges, check_gold
from rlmm.train.metrics import Meter, MetricsFile
from rlmm.train.processes import gather, share
from rlmm.train.results import save_result
from rlmm.train.running import train
from rollouts.contract import Engine
from rollouts.fingerprint import weights_fingerprint
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class GrpoBatch:
    """Rows of one micro-batch. `weight_BS` sums, with the others', to the step's denominators; `gate`: before the
    first update of a rollout, when trainer and sampler must agree."""

    trajectory: Trajectory
    advantage_B: Tensor
    kept_B: Tensor
    weight_BS: Tensor
    gate: bool
    old_logp_BS: Tensor | None = None
    reference_logp_BS: Tensor | None = None

    def to(self, device: torch.device | str) -> "GrpoBatch":
        names = ("advantage_B", "kept_B", "weight_BS", "old_logp_BS", "reference_logp_BS")
        moved = {n: getattr(self, n).to(device) for n in names if getattr(self, n) is not None}
        return replace(self, trajectory=self.trajectory.to(device), **moved)


class GrpoSource:
    """Step -> micro-batches. A rollout serves `updates_per_rollout` steps; after a kill inside one it is read back."""

    def __init__(self, context: StageContext, policy: CausalPolicy, codec: Codec, meter: Meter) -> None:
        self.context, self.policy, self.codec, self.meter = context, policy, codec, meter
        self.config: GrpoStage = context.config
        self.seed = context.seed("rollouts")
        self.data: Dataset = load_split(context, "prompts", policy.spelling)
        self.reward = build_composite(context.recipe.rewards)
        self.held_out = build_composite(context.recipe.held_out)
        bind_judges(context, {"rewards": self.reward, "held_out": self.held_out})
        self.engine: Engine = build_engine(self.config.engine, policy)
        self.law = phases.law_of(policy.layout, self.config.sampling)
        self.metrics = MetricsFile(context.folder / "metrics.jsonl")
        self.updates = self.config.objective.updates_per_rollout
        rows = share(self.config.rollouts, "prompts_per_step x samples_per_prompt")
        self.rows_an_update = (rows.stop - rows.start) // self.updates
        self.micro_batches_per_step = self.rows_an_update // self.config.micro_batch_size
        if self.micro_batches_per_step * self.config.micro_batch_size != self.rows_an_update:
            raise ValueError(
                f"{self.rows_an_update} rollouts a process and update are no multiple of micro_batch_size "
                f"{self.config.micro_batch_size}; change one of them or the number of processes"
            )
        self._held: tuple[int, Experience] | None = None
        self.nothing_counts = False

    def micro_batches(self, step: int) -> list[GrpoBatch]:
        rollout, update = divmod(step, self.updates)
        experience = self.make(rollout) if update == 0 else self._resume(rollout)
        return self._cut(experience, self._rows(experience.trajectory, update), gate=update == 0)

    def _rows(self, made: Trajectory, update: int) -> list[int]:
        """The rows of one update: an equal part of every group, so that the number of processes cannot matter."""
        each, rows = self.config.samples_per_prompt // self.updates, []
        for first in range(0, len(made), self.config.samples_per_prompt):
            order = generator(self.seed, "order", made.group_id[first]).permutation(self.config.samples_per_prompt)
            rows += [first + int(i) for i in order[update * each : (update + 1) * each]]
        return rows

    def make(self, rollout: int) -> Experience:
        """Sample, decode, score, and turn scores into advantages; everything is stored before it is trained on."""
        config, timed = self.config, Timed()
        with timed("rollout"):
            self._sync(rollout)
            prompts = phases.step_prompts(self.data, config, rollout, self.seed)
            requests = phases.rollout_requests(self.policy, self.codec, self.law, prompts, config, rollout, self.seed)
            made = phases.generate(self.engine, self.policy, self.law, requests, self.policy.model)
        with timed("score"):
            examples = [example for _, example in prompts for _ in range(config.samples_per_prompt)]
            images = phases.decode_images(self.codec, self.policy.layout, made)
            samples = phases.samples_of(made, examples, images)
            scored = self.reward.score(samples)
        reward_B, valid_B = phases.totals(scored, self.context.recipe.rewards.invalid_output_penalty)
        result, advantage_B, kept_B = phases.advantages_of(reward_B, valid_B, made.group_id, config)
        with timed("replay"):
            experience = self._with_log_probs(Experience(made, advantage_B, kept_B))
        phases.store(phases.rollout_path(self.context.folder, rollout), rollout, experience, samples, scored)
        figures = phases.rollout_figures(scored, reward_B, valid_B, result, made)
        if config.held_out_every and rollout % config.held_out_every == 0:
            with timed("held_out"):
                judged = [s for part in gather(self.held_out.score(samples)) for s in part]
                figures |= phases.term_means(judged, "held_out")
        check_shares(self.metrics.read(), figures, config.gates)
        self.meter.put({**figures, **timed.figures()})
        self._forget(rollout)
        self._held = (rollout, experience)
        return experience

    def _sync(self, rollout: int) -> None:
        """Hand the engine the weights, and believe it only by its fingerprint."""
        self.engine.sync(self.policy.named_weights(), rollout)
        mine, theirs = weights_fingerprint(self.policy.named_weights()), self.engine.fingerprint()
        if mine != theirs:
            raise RuntimeError(
                f"after the weight sync of rollout {rollout} the engine's weights ({theirs}) are not the trainer's "
                f"({mine}); its samples would be of another policy. This is a fault of the engine: use engine.kind "
                "torch, and report it"
            )

    def _with_log_probs(self, experience: Experience) -> Experience:
        """Old log-probs where several updates share the rollout, reference ones where a KL term asks for them."""
        objective = self.config.objective
        if self.updates > 1:
            made = experience.trajectory
            old_BS = self._replay(made)
            experience = replace(experience, old_logp_BS=old_BS)
            # The gate of the first update sees only that update's rows; these are all of them.
            found = measure_mismatch(old_BS, made.sampler_logp, made.target_mask)
            check_mismatch(found, self.config.gates, self.config.precision, corrected=corrected(objective, made))
        if objective.kl.coefficient > 0:
            with self.policy.reference():
                experience = replace(experience, reference_logp_BS=self._replay(experience.trajectory))
        return experience

    @torch.no_grad()
    def _replay(self, trajectory: Trajectory) -> Tensor:
        size, device = self.config.micro_batch_size, self.policy.base.device
        parts = [
            self.policy.log_probs(trajectory.rows(list(range(at, min(at + size, len(trajectory))))).to(device)).logp_BS
            for at in range(0, len(trajectory), size)
        ]
        return torch.cat(parts).cpu().float()

    def _resume(self, rollout: int) -> Experience:
        if self._held is None or self._held[0] != rollout:
            self._held = (rollout, phases.restore(phases.rollout_path(self.context.folder, rollout)))
        return self._held[1]

    def _forget(self, rollout: int) -> None:
        """Delete rollout files nobody keeps, but not one a checkpoint may still resume into."""
        kept_steps = self.config.checkpoint_every * (self.config.checkpoints_kept + 1)
        old = rollout - 1 - kept_steps // self.updates
        if old >= 0 and old % self.config.store_every:
            phases.rollout_path(self.context.folder, old).unlink(missing_ok=True)

    def _cut(self, experience: Experience, rows: list[int], *, gate: bool) -> list[GrpoBatch]:
        """Rows that count, spread evenly: dropped ones are not worth a forward pass. Where fewer count than there are
        micro-batches, a dropped row (its weight is 0) stands in, since every process must run every one."""
        kept = [row for row in rows if experience.kept_B[row]]
        stand_in = [row for row in rows if not experience.kept_B[row]][:1]
        chosen = experience.trajectory.rows(rows)
        totals = sum(gather(count_totals(chosen.target_mask, experience.kept_B[rows])), Totals(0, 0))
        self.nothing_counts = totals.sequences == 0
        parts = spread(kept, self.micro_batches_per_step)
        return [self._batch(experience, part or stand_in, totals, gate) for part in parts]

    def _batch(self, experience: Experience, rows: Sequence[int], totals: Totals, gate: bool) -> GrpoBatch:
        trajectory, at = experience.trajectory.rows(rows), torch.as_tensor(rows)
        spans = torch.tensor([span.advantage_weight for span in trajectory.spans])
        weight_BS = token_weights(
            self.config.objective.objective().weights,
            trajectory.target_mask,
            experience.kept_B[at],
            totals=totals,
            max_length=sum(span.length_limit for span in trajectory.spans),
            advantage_weight_BS=spans[trajectory.span.long()],
        )
        return GrpoBatch(
            trajectory,
            experience.advantage_B[at],
            experience.kept_B[at],
            weight_BS,
            gate,
            None if experience.old_logp_BS is None else experience.old_logp_BS[at],
            None if experience.reference_logp_BS is None else experience.reference_logp_BS[at],
        )


def spread(rows: Sequence[int], parts: int) -> list[list[int]]:
    """`rows` in `parts` runs whose lengths differ by at most one."""
    bounds = [len(rows) * i // parts for i in range(parts + 1)]
    return [list(rows[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def grpo_loss(policy: CausalPolicy, config: GrpoStage, model: nn.Module, batch: GrpoBatch, meter: Meter) -> Tensor:
    """sum(weight x (clipped policy loss + coefficient x KL)) of a micro-batch; the mismatch gate stands before it."""
    objective, trajectory = config.objective, batch.trajectory
    current = policy.log_probs(trajectory, model=model)
    target = trajectory.target_mask
    if batch.gate:
        found = measure_mismatch(current.logp_BS, trajectory.sampler_logp, target)
        meter.add("mismatch/mean", found.total, found.count)
        meter.add("mismatch/max", found.largest)
        check_mismatch(found, config.gates, config.precision, corrected=corrected(objective, trajectory))
    # With one update a rollout the old policy is the current one: its log-probs are these, without gradient.
    old_BS = current.logp_BS.detach() if batch.old_logp_BS is None else batch.old_logp_BS
    loss = POLICY_LOSSES[objective.surrogate](
        current.logp_BS,
        old_BS,
        batch.advantage_B,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        level=objective.level,
        target_mask_BS=target,
    )
    per_token_BS = loss.loss_BS
    if objective.mismatch is not None:
        per_token_BS = per_token_BS * _correction(objective.mismatch, old_BS, batch, meter)
    if batch.reference_logp_BS is not None:
        per_token_BS = per_token_BS + _penalty(objective, current.logp_BS, old_BS, batch, meter)
    counted = target & batch.kept_B[:, None]
    meter.add("entropy", float(current.entropy_BS[counted].sum()), float(counted.sum()))
    for name, total in policy_metrics(loss, target, batch.kept_B).items():
        meter.total(name, total)
    return (batch.weight_BS * per_token_BS).sum()


def corrected(objective: ObjectiveConfig, trajectory: Trajectory) -> bool:
    """Whether importance weights answer for a mismatch: one of arithmetic, never one of laws."""
    return objective.mismatch is not None and not any(span.law.off_policy for span in trajectory.spans)


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


def _penalty(objective: ObjectiveConfig, logp_BS: Tensor, old_BS: Tensor, batch: GrpoBatch, meter: Meter) -> Tensor:
    reference, target = batch.reference_logp_BS, batch.trajectory.target_mask
    assert reference is not None, "called only with a reference"
    old = old_BS if objective.kl.importance_weighted else None
    penalty_BS = kl_loss(objective.kl.kind, logp_BS, reference, old_logp_BS=old, target_mask_BS=target)
    counted = target & batch.kept_B[:, None]
    estimate = kl_estimate("k3", logp_BS.detach(), reference, target_mask_BS=target)
    meter.add("kl", float(estimate[counted].sum()), float(counted.sum()))
    return objective.kl.coefficient * penalty_BS


def run_grpo(context: StageContext) -> None:
    """Train from the starting policy on the recipe's prompts; leaves model/ (and adapter/) in the stage's folder."""
    config: GrpoStage = context.config
    codec = run_codec(context)
    policy = starting_policy(context, codec)
    if config.objective.kl.coefficient > 0:
        policy.freeze_reference()
    check_gold(context)
    meter = Meter()
    source = GrpoSource(context, policy, codec, meter)
    train(
        context,
        policy.model,
        source,
        lambda model, batch, meter: grpo_loss(policy, config, model, batch, meter),
        meter,
        micro_batch_size=config.micro_batch_size,
        show=("reward/mean", "group/flat_share", "entropy", "mismatch/max", "grad_norm"),
    )
    source.engine.close()
    save_result(context, policy, codec)
