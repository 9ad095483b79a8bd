"""Step -> micro-batches of a GRPO stage: rollouts are made, gated, stored and cut."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch

from rlmm.codecs import Codec
from rlmm.config.objectives import ObjectiveConfig
from rlmm.config.stages import GrpoStage
from rlmm.data import Dataset
from rlmm.objectives.estimators import Estimator
from rlmm.objectives.weights import Totals, count_totals, token_weights
from rlmm.policies.responses import response_of
from rlmm.policies.still import Still
from rlmm.policies.transformer import TransformerPolicy
from rlmm.rewarding import build_composite
from rlmm.seeds import generator
from rlmm.train import experience as phases
from rlmm.train.ahead import Ahead, Drawn
from rlmm.train.canary import canary_figures
from rlmm.train.context import StageContext, image_tokens, load_split
from rlmm.train.credit import advantages
from rlmm.train.engines import build_engine, within
from rlmm.train.experience import Experience, Timed
from rlmm.train.gates import check_mismatch, check_shares, measure_mismatch
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.judges import bind_judges
from rlmm.train.launch import keeps_parts
from rlmm.train.metrics import Meter, MetricsFile
from rlmm.train.processes import gather, share
from rlmm.train.read_back import finish, finished, gate_settings, record_path
from rlmm.train.replay import Replayed, replay
from rlmm.train.rounds import Roller, Rollout, replaced_figure
from rlmm.train.score_cache import Scores
from rlmm.train.sync import fingerprint, synced
from rollouts.contract import Engine
from rollouts.trajectory import Trajectory


class GrpoSource:
    """Step -> micro-batches. A rollout serves `updates_per_rollout` steps; after a kill inside one it is read back."""

    def __init__(self, context: StageContext, policy: TransformerPolicy, codec: Codec, meter: Meter) -> None:
        self.context, self.policy, self.meter = context, policy, meter
        self.config: GrpoStage = context.config
        self.seed = context.seed("rollouts")
        still = Still(policy) if self.config.max_staleness else None
        sampled = policy if still is None else still.policy
        response = response_of(sampled, self.config.sampling)
        data: Dataset = load_split(context, "prompts", within(self.config.engine, response.spelling))
        self._count()
        reward, self.held_out = map(build_composite, (context.recipe.rewards, context.recipe.held_out))
        bind_judges(context, judges := {"rewards": reward, "held_out": self.held_out})
        self.scores = Scores(judges, context.say)
        self.metrics = MetricsFile(context.folder / "metrics.jsonl")
        self._held: tuple[int, Experience] | None = None
        self.nothing_counts = False
        # Last, since it may start servers, which what is refused would leave.
        self.roller = Roller(
            self.config,
            data,
            sampled,
            image_tokens(context, codec, policy),
            build_engine(self.config.engine, sampled, response.law, parting=keeps_parts(self.config.deepspeed)),
            response,
            reward,
            context.recipe.rewards.invalid_output_penalty,
            self.seed,
        )
        self.ahead = None if still is None else Ahead(context, self.roller, still)

    def _count(self) -> None:
        """Rows and micro-batches of this process's updates. Raises ValueError where they do not come out even."""
        self.updates = self.config.objective.updates_per_rollout
        mine = (rows := share(self.config.rollouts, "prompts_per_step x samples_per_prompt")).stop - rows.start
        self.rows_an_update = mine // self.updates
        self.micro_batches_per_step = self.rows_an_update // self.config.micro_batch_size
        if self.micro_batches_per_step * self.config.micro_batch_size != self.rows_an_update:
            raise ValueError(
                f"{self.rows_an_update} rollouts a process and update are no multiple of micro_batch_size "
                f"{self.config.micro_batch_size}; change one of them or the number of processes"
            )
        if self.config.diagnostics.gradient_agreement and mine // self.config.samples_per_prompt % 2:
            raise ValueError(
                "diagnostics.gradient_agreement compares the even and the odd prompts of each process, and prompts_per_"
                f"step {self.config.prompts_per_step} gives one an odd number of them; use a multiple of twice as many"
            )

    @property
    def engine(self) -> Engine:
        return self.roller.engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the servers that were started. Where the stage failed and draws ahead, the process's end does: the error
        does not wait for the rollout under way, nor does its engine go from beneath it."""
        if self.ahead is None or kind is None:
            if self.ahead is not None:
                self.ahead.close()
            self.engine.close()

    def micro_batches(self, step: int) -> list[GrpoBatch]:
        rollout, update = divmod(step, self.updates)
        if update == 0:
            experience = self.make(rollout)
        else:
            experience = self._resume(rollout)
        # The gate of a rollout that was drawn ahead stood where the weights were those that drew it.
        gate = update == 0 and not self.config.max_staleness
        return self._cut(experience, self._rows(experience.trajectory, update), gate, self._entropy_bonus())

    def _entropy_bonus(self) -> float:
        """The coefficient of this step: 0 where the step before had more entropy than the floor."""
        settings = self.config.objective.entropy
        if not settings.coefficient or settings.floor is None:
            return settings.coefficient
        seen = [row["entropy"] for row in self.metrics.last(100) if row.get("entropy") is not None]
        last = gather(seen[-1] if seen else None)[0]  # the first process's: it alone writes the file
        return 0.0 if last is not None and last > settings.floor else settings.coefficient

    def _rows(self, made: Trajectory, update: int) -> list[int]:
        """The rows of one update: an equal part of every group, so that the number of processes cannot matter."""
        each, rows = self.config.samples_per_prompt // self.updates, []
        for first in range(0, len(made), self.config.samples_per_prompt):
            order = generator(self.seed, "order", made.group_id[first]).permutation(self.config.samples_per_prompt)
            rows += [first + int(i) for i in order[update * each : (update + 1) * each]]
        return rows

    def make(self, rollout: int) -> Experience:
        """The rollout that these weights draw, or that was drawn ahead; where a run that was ended has drawn and
        finished it, that one is read back. An engine that is not deterministic (vLLM) would draw another."""
        timed = Timed()
        drawn, gate = (None, {}) if self.ahead is None else self.ahead.take(rollout, timed)
        experience, figures = self._read_back(rollout, drawn) or self._roll(rollout, drawn, gate, timed)
        self.meter.put(figures)
        self._forget(rollout)
        self._held = (rollout, experience)
        return experience

    def _read_back(self, rollout: int, drawn: Drawn | None) -> tuple[Experience, dict[str, float]] | None:
        path = phases.rollout_path(self.context.folder, rollout)
        record = finished(path, gate_settings(self.context))
        if not all(gather(record is not None)):
            return None
        # By all processes or by none: where weights are in parts their fingerprint is a collective.
        weights = fingerprint(self.policy, self.engine) if drawn is None else drawn.weights
        assert record is not None, "all have one"
        if not all(gather(record["weights"] == weights)):
            return None
        self.context.say(f"rollout {rollout} is read back: it was finished, and drawn by these weights")
        self.scores.remember(record.get("scores", {}), record_path(path))
        return phases.restore(path), record["figures"]

    def _roll(
        self, rollout: int, drawn: Drawn | None, figures: dict[str, float], timed: Timed
    ) -> tuple[Experience, dict[str, float]]:
        """Sample, decode, score, and turn scores into advantages; everything is stored before it is trained on."""
        config, known = self.config, self.scores.known()
        if drawn is None:
            with timed("rollout"):
                weights = synced(self.policy, self.engine, rollout)
            found = self.roller.roll(rollout, timed)
        else:
            weights, found = drawn.weights, self.roller.judge(drawn.made, drawn.samples, timed)
        reward_B, valid_B = phases.totals(found.scored, self.roller.penalty)
        result, *mine = advantages(found.scored, reward_B, valid_B, found.made, self.roller.reward, config)
        with timed("replay"):
            experience = self._with_log_probs(Experience(found.made, *mine))
        path = phases.rollout_path(self.context.folder, rollout)
        phases.store(path, rollout, experience, found.samples, found.scored)
        self.roller.reward.failures.check(phases.everyones_totals(found.scored))
        figures = figures | phases.rollout_figures(found.scored, reward_B, valid_B, result, found.made)
        figures |= replaced_figure(found, config) | self._held_out_figures(rollout, found, timed)
        judges = [*self.roller.reward.terms, *self.held_out.terms]
        figures |= canary_figures(self.context.folder, config, judges, rollout, found.samples)
        check_shares(self.metrics.last(config.gates.patience * self.updates), figures, config.gates)
        figures |= timed.figures()
        finish(path, weights, gate_settings(self.context), figures, self.scores.record(known))
        return experience, figures

    def _held_out_figures(self, rollout: int, found: Rollout, timed: Timed) -> dict[str, float]:
        every = self.config.held_out_every
        if not every or rollout % every:
            return {}
        with timed("held_out"):
            judged = self.held_out.score(found.samples)
            self.held_out.failures.check(phases.everyones_totals(judged))
        return phases.term_means(judged, "held_out")

    def _with_log_probs(self, experience: Experience) -> Experience:
        """Old log-probs where several updates share the rollout, reference ones where a KL term asks for them."""
        objective = self.config.objective
        if self.updates > 1:
            made = experience.trajectory
            old_BS = self._replay(made).logp_BS
            experience = replace(experience, old_logp_BS=old_BS)
            # The gate of the first update sees only that update's rows; these are all of them.
            if not self.config.max_staleness and estimator_of(self.config) in (None, Estimator()):
                found = measure_mismatch(old_BS, made.sampler_logp, made.target_mask)
                check_mismatch(found, self.config.gates, self.config.precision, corrected=corrected(objective, made))
        if objective.kl.coefficient > 0:
            with self.policy.reference():
                found = self._replay(experience.trajectory)
            draws_Bn = found.draws_Bn if self.config.kl_of_bounds else None
            experience = replace(experience, reference_logp_BS=found.logp_BS, reference_draws_Bn=draws_Bn)
        return experience

    def _replay(self, trajectory: Trajectory) -> Replayed:
        return replay(self.policy, trajectory, estimator_of(self.config), self.config.micro_batch_size)

    def resume_fault(self, step: int) -> str | None:
        """Why this process cannot go on after `step` updates: inside a rollout, whose file is needed and cannot be
        read."""
        rollout, update = divmod(step, self.updates)
        if update == 0 or step == self.config.steps:
            return None
        try:
            self._resume(rollout)
        except (OSError, ValueError) as error:
            return f"it lies inside rollout {rollout}, and that cannot be read back: {error}"
        return None

    def _resume(self, rollout: int) -> Experience:
        if self._held is None or self._held[0] != rollout:
            self._held = (rollout, phases.restore(phases.rollout_path(self.context.folder, rollout)))
        return self._held[1]

    def _forget(self, rollout: int) -> None:
        """Delete rollout files nobody keeps, but not one a checkpoint may still resume into."""
        kept_steps = self.config.checkpoint_every * (self.config.checkpoints_kept + 1)
        old = rollout - 1 - kept_steps // self.updates
        if old >= 0 and old % self.config.store_every:
            path = phases.rollout_path(self.context.folder, old)
            path.unlink(missing_ok=True)
            record_path(path).unlink(missing_ok=True)

    def _cut(self, experience: Experience, rows: list[int], gate: bool, entropy: float) -> list[GrpoBatch]:
        """Rows that count, spread evenly: dropped ones are not worth a forward pass. Where fewer count than there are
        micro-batches, a dropped row (its weight is 0) stands in, since every process must run every one."""
        kept = [row for row in rows if experience.kept_B[row]]
        stand_in = [row for row in rows if not experience.kept_B[row]][:1]
        chosen = experience.trajectory.rows(rows)
        mine = count_totals(chosen.target_mask, experience.kept_B[rows])
        totals = sum((Totals(*part) for part in gather([mine.sequences, mine.tokens])), Totals(0, 0))
        self.nothing_counts = totals.sequences == 0
        parts = self._parts(kept)
        batches = [self._batch(experience, part or stand_in, totals) for part in parts]
        return [replace(batch, gate=gate, entropy_coefficient=entropy) for batch in batches]

    def _parts(self, kept: list[int]) -> list[list[int]]:
        """Rows of each micro-batch. Where halves of the step are compared, the first one has the groups at even places
        and the second one those at odd places: samples of one group share a baseline, so parts of it would disagree."""
        count = self.micro_batches_per_step
        if not self.config.diagnostics.gradient_agreement:
            return spread(kept, count)
        size = self.config.samples_per_prompt
        halves = [[row for row in kept if row // size % 2 == odd] for odd in (0, 1)]
        return [part for half in halves for part in spread(half, count // 2)]

    def _batch(self, experience: Experience, rows: Sequence[int], totals: Totals) -> GrpoBatch:
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
            experience.advantage[at],
            experience.kept_B[at],
            weight_BS,
            False,
            None if experience.old_logp_BS is None else experience.old_logp_BS[at],
            None if experience.reference_logp_BS is None else experience.reference_logp_BS[at],
            None if experience.reference_draws_Bn is None else experience.reference_draws_Bn[at],
        )


def spread(rows: Sequence[int], parts: int) -> list[list[int]]:
    """`rows` in `parts` runs whose lengths differ by at most one."""
    bounds = [len(rows) * i // parts for i in range(parts + 1)]
    return [list(rows[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def estimator_of(config: GrpoStage) -> Estimator | None:
    """None: the policy's own exact log-prob, or its trajectory's."""
    return None if config.estimator is None else config.estimator.record()


def corrected(objective: ObjectiveConfig, trajectory: Trajectory) -> bool:
    """Whether importance weights answer for a mismatch: one of arithmetic, never one of laws."""
    return objective.mismatch is not None and not any(span.law.off_policy for span in trajectory.spans)
