"""One set of rollouts: sampled, decoded, scored; groups without spread are replaced by other prompts' where asked."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewards.base import Sample
from rewards.compose import CompositeReward, Scored
from rewards.overlap import scored_behind
from rlmm.config.objectives import AdvantageConfig
from rlmm.config.stages import GrpoStage
from rlmm.data import Dataset, Example
from rlmm.objectives.advantages import group_advantages
from rlmm.policies.responses import Response, texts_of
from rlmm.policies.transformer import TransformerPolicy
from rlmm.seeds import epoch_indices
from rlmm.train import experience as phases
from rlmm.train.drawing import decode_images
from rlmm.train.drawn import picture
from rlmm.train.experience import Timed
from rlmm.train.processes import gather
from rlmm.train.recovery import PutOff, regained
from rlmm.train.tokens import ImageTokens
from rollouts.contract import Engine
from rollouts.store import read_trajectory
from rollouts.trajectory import Trajectory, concatenate

Prompts = Sequence[tuple[int, Example]]
"""(place in the step, row) pairs."""
Made = tuple[Trajectory, list[Sample]]
Part = tuple[Made, list[Scored]]


@dataclass(frozen=True)
class Rollout:
    """Scored rows of this process, `samples_per_prompt` a prompt. `replaced`: groups that were thrown away for them."""

    made: Trajectory
    samples: list[Sample]
    scored: list[Scored]
    replaced: int = 0


@dataclass(frozen=True)
class Roller:
    """What a rollout is made with."""

    config: GrpoStage
    data: Dataset
    policy: TransformerPolicy
    tokens: ImageTokens
    engine: Engine
    response: Response
    reward: CompositeReward
    penalty: float
    seed: int

    def roll(self, rollout: int, timed: Timed) -> Rollout:
        """The step's rollouts. Up to `resample_flat` times, prompts whose group came out without spread are replaced
        (DAPO, arXiv 2503.14476, eq. 11); what is still flat after that stays and is dropped from the loss.

        A replacement is a function of rollout, round and place, so neither a resumed run nor one with other processes
        draws another. Where weights are in parts processes make the same number of rounds: one that has nothing to
        replace stands by.
        """
        config, together = self.config, self.policy.in_parts
        prompts = phases.step_prompts(self.data, config, rollout, self.seed)
        found = self._joined(self._round(rollout, prompts, 0, timed))
        for extra in range(1, config.resample_flat + 1):
            flat = self._flat(found)
            if not any(gather(bool(flat)) if together else [flat]):
                break
            count = config.prompts_per_step
            first = (rollout * config.resample_flat + extra - 1) * count
            rows = epoch_indices(len(self.data), first, count, self.seed, "replacements")
            others = [(prompts[i][0], self.data[rows[prompts[i][0]]]) for i in flat]
            new = self._round(rollout, others, extra, timed)
            if flat:
                found = self._replace(found, flat, self._joined(new))
        return found

    def draw(self, rollout: int) -> Made:
        """The step's samples, not scored."""
        return self._drawn(rollout, phases.step_prompts(self.data, self.config, rollout, self.seed), 0, Timed())

    def read(self, path: Path) -> tuple[Trajectory, list[Sample], dict[str, list[Any]]]:
        """What `draw` gave, from a rollout's file, and the file's columns."""
        made, columns = read_trajectory(path)
        images = [picture(png).copy() for png in columns["image"] if png is not None]
        prompts = phases.step_prompts(self.data, self.config, columns["step"][0], self.seed)
        return made, phases.samples_of(made, self._each(prompts), images, columns["text"]), columns

    def judge(self, made: Trajectory, samples: list[Sample], timed: Timed) -> Rollout:
        """Samples that `draw` gave, scored."""
        with timed("score"):
            return Rollout(made, samples, self.reward.score(samples))

    def _each(self, prompts: Prompts) -> list[Example]:
        return [example for _, example in prompts for _ in range(self.config.samples_per_prompt)]

    def _round(self, rollout: int, prompts: Prompts, extra: int, timed: Timed) -> list[Part]:
        """The prompts' rollouts: chunk after chunk of `score_chunk` prompts, each scored while the next is drawn. What
        comes out does not depend on the chunks: a row draws by its own seed, and a chunk has whole groups. An engine
        that was lost goes on with the chunk that it was lost in."""
        size = self.config.score_chunk or max(1, len(prompts))
        chunks = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        parts = self._scored(rollout, chunks, extra, timed)
        if regained(self.engine):
            parts += self._scored(rollout, chunks[len(parts) :], extra, timed)
        return parts

    def _scored(self, rollout: int, chunks: Sequence[Prompts], extra: int, timed: Timed) -> list[Part]:
        """Of the chunks, up to one in which the engine was lost."""
        drawn = self._draws(rollout, chunks, extra, timed)
        with timed.rest("score", "rollout"):
            if len(chunks) > 1:
                return scored_behind(drawn, lambda one: self.reward.score(one[1]))
            return [(one, self.reward.score(one[1])) for one in list(drawn)]

    def _draws(self, rollout: int, chunks: Sequence[Prompts], extra: int, timed: Timed) -> Iterator[Made]:
        with self._held():
            for chunk in chunks:
                try:
                    made = self._drawn(rollout, chunk, extra, timed)
                except PutOff:
                    return
                yield made

    def _held(self) -> AbstractContextManager[None]:
        """Around drawing: the whole policy, where the engine draws or the codec decodes by its own modules."""
        return self.policy.whole() if self.engine.reads_policy or self.tokens.codec.reads_hidden else nullcontext()

    def _joined(self, parts: Sequence[Part]) -> Rollout:
        return Rollout(
            concatenate([made for (made, _), _ in parts], self.policy.layout.pad),
            [sample for (_, samples), _ in parts for sample in samples],
            [one for _, scored in parts for one in scored],
        )

    def _drawn(self, rollout: int, prompts: Prompts, extra: int, timed: Timed) -> Made:
        config = self.config
        with timed("rollout"):
            requests = phases.rollout_requests(self.response, self.tokens, prompts, config, rollout, self.seed, extra)
            made = phases.generate(self.engine, self.response, requests, self.policy.model)
        images = decode_images(self.tokens.codec, self.policy, made)
        return made, phases.samples_of(made, self._each(prompts), images, texts_of(self.policy.tokenizer, made))

    def _flat(self, found: Rollout) -> list[int]:
        reward_B, valid_B = phases.totals(found.scored, self.penalty)
        return flat_groups(reward_B, valid_B, self.config.samples_per_prompt, self.config.objective.advantage)

    def _replace(self, found: Rollout, flat: Sequence[int], new: Rollout) -> Rollout:
        """`found` with the groups at `flat` taken from `new`, in `new`'s order."""
        size, old_rows = self.config.samples_per_prompt, len(found.samples)
        at = torch.arange(old_rows).unflatten(0, (-1, size))
        at[list(flat)] = torch.arange(old_rows, old_rows + len(flat) * size).unflatten(0, (-1, size))
        order = at.flatten().tolist()
        both = concatenate([found.made, new.made], self.policy.layout.pad)
        samples, scored = found.samples + new.samples, found.scored + new.scored
        return Rollout(
            both.rows(order),
            [samples[row] for row in order],
            [scored[row] for row in order],
            found.replaced + len(flat),
        )


def flat_groups(reward_B: np.ndarray, valid_B: np.ndarray, size: int, settings: AdvantageConfig) -> list[int]:
    """Numbers of the groups of `size` consecutive rows that give no gradient: flat, or too few available rewards."""
    kept = group_advantages(
        reward_B,
        valid_B,
        np.arange(len(reward_B)) // size,
        baseline=settings.baseline,
        scale=settings.scale,
        std_floor=settings.std_floor,
        flat_groups="drop",
    ).kept_B
    return [i for i, row in enumerate(kept.reshape(-1, size)) if not row.any()]


def replaced_figure(found: Rollout, config: GrpoStage) -> dict[str, float]:
    """Groups thrown away for being flat, as a share of all groups sampled in the step, over all processes."""
    if not config.resample_flat:
        return {}
    replaced = sum(gather(found.replaced))
    return {"group/replaced_share": replaced / (replaced + config.prompts_per_step)}
