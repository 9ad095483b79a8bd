"""A run's start, and scored rollouts of it, on which `rlmm bench gradients` differentiates every estimate.

Shapes: B rows, S response positions, W trained weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rlmm.config.base import nearest
from rlmm.config.masked import EstimatorConfig
from rlmm.config.objectives import ObjectiveConfig
from rlmm.config.recipe import recipe_of
from rlmm.config.stages import GrpoStage
from rlmm.objectives.weights import count_totals, token_weights
from rlmm.policies.masked import MaskedPolicy
from rlmm.policies.responses import response_of
from rlmm.rewarding import build_composite
from rlmm.run_folder import RunFolder
from rlmm.seeds import derive
from rlmm.train import experience as phases
from rlmm.train.context import StageContext, image_tokens, load_split, parent, run_codec, starting_policy
from rlmm.train.credit import advantages
from rlmm.train.engines import build_engine
from rlmm.train.experience import Experience, Timed
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.grpo_source import spread
from rlmm.train.metrics import Meter
from rlmm.train.rounds import Roller

RATIO_FREE = ObjectiveConfig.model_validate({"name": "reinforce"})


@dataclass(frozen=True)
class Start:
    """A masked policy and the GRPO stage whose law, prompts and advantages are used."""

    policy: MaskedPolicy
    config: GrpoStage

    def gradient(self, made: Experience, estimator: EstimatorConfig, seeds: Sequence[int]) -> Tensor:
        """Of the stage's own loss [W] by every trained weight, under the noise of `seeds`, one a row. The loss has no
        ratio: in the first update of a rollout every ratio is 1, and a ratio's gradient that of its log-prob."""
        config = self.config.model_copy(update={"estimator": estimator, "objective": RATIO_FREE})
        trajectory, kept = replace(made.trajectory, seed=tuple(seeds)), made.kept_B.nonzero().flatten().tolist()
        totals = count_totals(trajectory.target_mask, made.kept_B)
        self.policy.model.zero_grad()
        for rows in spread(kept, -(-len(kept) // config.micro_batch_size)):
            part, kept_B = trajectory.rows(rows), made.kept_B[rows]
            weight_BS = token_weights(config.objective.objective().weights, part.target_mask, kept_B, totals=totals)
            batch = GrpoBatch(part, made.advantage[rows], kept_B, weight_BS, gate=False)
            grpo_loss(self.policy, config, self.policy.model, batch, Meter()).backward()
        trained = [weight for weight in self.policy.model.parameters() if weight.requires_grad]
        return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in trained])


def plan_seeds(made: Experience, plan: int | str) -> list[int]:
    """Seeds of the rows' noise in one plan: of each sample its own."""
    return [derive("bench gradients", seed, plan) for seed in made.trajectory.seed]


def opened(folder: Path, stage: str) -> StageContext:
    """A GRPO stage of a run of a masked policy. Raises ValueError where there is none, where its start is not there, or
    where its rollouts tell too little to be read by every estimate."""
    recipe = recipe_of(folder)
    run, config = RunFolder(folder, tuple(recipe.stages)), recipe.stages.get(stage)
    if not isinstance(config, GrpoStage):
        known = [name for name, one in recipe.stages.items() if isinstance(one, GrpoStage)]
        raise ValueError(f"{folder} has no GRPO stage {stage!r}.{nearest(stage, known)}")
    if config.sampling.unmasking is None:
        raise ValueError(f"{folder}: stage {stage!r} is of a next-token policy, whose log-probs are exact; give a "
                         "masked policy's run")  # fmt: skip
    if config.sampling.top_k or config.sampling.top_p < 1:
        raise ValueError(
            f"stage {stage!r} samples with top_k or top_p, whose supports are stored where a token was decided alone; "
            "noise plans need them elsewhere, too: give a stage without"
        )
    context = StageContext(recipe, run, stage, config, lambda _: None)
    start = parent(context)
    if start is not None and not run.done(start):
        raise ValueError(f"{folder}: stage {start!r}, from which {stage!r} starts, is not done; run it first")
    return context


def rolled(context: StageContext, count: int) -> tuple[Start, Iterator[Experience]]:
    """The start and `count` scored rollouts of it, each of other prompts and samples. Raises ValueError where tokens of
    a row earn apart."""
    config, recipe, codec = context.config, context.recipe, run_codec(context)
    policy = starting_policy(context, codec)
    assert isinstance(policy, MaskedPolicy), "the recipe says so"
    response, seed = response_of(policy, config.sampling), derive(recipe.seed, "bench gradients")
    roller = Roller(
        config,
        load_split(context, "prompts", response.spelling),
        policy,
        image_tokens(context, codec, policy),
        build_engine(config.engine, policy, response.law),
        response,
        build_composite(recipe.rewards),
        recipe.rewards.invalid_output_penalty,
        seed,
    )
    return Start(policy, config), (_scored(roller, number) for number in range(count))


def _scored(roller: Roller, number: int) -> Experience:
    found = roller.roll(number, Timed())
    reward_B, valid_B = phases.totals(found.scored, roller.penalty)
    _, advantage, kept_B = advantages(found.scored, reward_B, valid_B, found.made, roller.reward, roller.config)
    if advantage.ndim == 2:
        raise ValueError(
            "the recipe's rewards are earned by tokens or steps apart, and of a noise plan only a row's sum means "
            "something; give a recipe whose rewards have span: all"
        )
    return Experience(found.made, advantage, kept_B)
