"""One set of rollouts: sampled, decoded, scored; groups without spread are replaced by other prompts' where asked."""

from collections.abc import Sequence
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
from rlmm.train.tokens import ImageTokens
from rollouts.contract import Engine
from rollouts.store import read_trajectory
from rollouts.trajectory import Trajectory, concatenate


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
        draws another.
        """
        config = self.config
        prompts = phases.step_prompts(self.data, config, rollout, self.seed)
        found = self._once(rollout, prompts, 0, timed)
        for extra in range(1, config.resample_flat + 1):
            flat = self._flat(found)
            if not flat:
                break
            count = config.prompts_per_step
            first = (rollout * config.resample_flat + extra - 1) * count
            rows = epoch_indices(len(self.data), first, count, self.seed, "replacements")
            others = [(prompts[i][0], self.data[rows[prompts[i][0]]]) for i in flat]
            found = self._replace(found, flat, self._once(rollout, others, extra, timed))
        return found

    def draw(self, rollout: int) -> tuple[Trajectory, list[Sample]]:
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

    def _each(self, prompts: Sequence[tuple[int, Example]]) -> list[Example]:
        return [example for _, example in prompts for _ in range(self.config.samples_per_prompt)]

    def _once(self, rollout: int, prompts: Sequence[tuple[int, Example]], extra: int, timed: Timed) -> Rollout:
        """The prompts' rollouts: chunk after chunk of `score_chunk` prompts, each scored while the next is drawn. What
        comes out does not depend on the chunks: a row draws by its own seed, and a chunk has whole groups."""
        size = self.config.score_chunk or len(prompts)
        chunks = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        drawn = (self._drawn(rollout, chunk, extra, timed) for chunk in chunks)
        with timed.rest("score", "rollout"):
            if len(chunks) == 1:
                parts = [(one, self.reward.score(one[1])) for one in drawn]
            else:
                parts = scored_behind(drawn, lambda one: self.reward.score(one[1]))
        return Rollout(
            concatenate([made for (made, _), _ in parts], self.policy.layout.pad),
            [sample for (_, samples), _ in parts for sample in samples],
            [one for _, scored in parts for one in scored],
        )

    def _drawn(
        self, rollout: int, prompts: Sequence[tuple[int, Example]], extra: int, timed: Timed
    ) -> tuple[Trajectory, list[Sample]]:
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
