"""rlmm's side of `rlmm bench step`: the stage trainer over one fixed batch."""

from pathlib import Path

import torch
from transformers import TrainerCallback

from rlmm.bench.step_problem import (
    LEARNING_RATE,
    Sampled,
    Side,
    StepProblem,
    build_policy,
    make_samples,
    make_trajectory,
)
from rlmm.config.policy import Lora
from rlmm.config.stages import GrpoStage
from rlmm.objectives.advantages import group_advantages
from rlmm.objectives.weights import count_totals, token_weights
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.metrics import Meter, MetricsFile
from rlmm.train.processes import device
from rlmm.train.trainer import StageTrainer, training_arguments


class FixedSource:
    """The same micro-batches, a whole step, every time."""

    nothing_counts = False

    def __init__(self, batches: list[GrpoBatch]) -> None:
        self.batches, self.micro_batches_per_step = batches, len(batches)

    def micro_batches(self, step: int) -> list[GrpoBatch]:
        return self.batches


def run_rlmm(side: Side, problem: StepProblem, steps: int, callback: TrainerCallback, folder: Path) -> None:
    """Make `steps` updates; the callback sees them begin and end."""
    config = GrpoStage.model_validate(
        {
            "steps": steps,
            "learning_rate": LEARNING_RATE,
            "micro_batch_size": problem.rows,
            "prompts_per_step": problem.prompts,
            "samples_per_prompt": problem.samples,
            "gradient_checkpointing": side.checkpointing,
        }
    )
    policy = build_policy(problem)
    if side.lora:
        policy.add_lora(Lora(), seed=0)
    policy.to(device())
    policy.train_image_rows()
    batch = make_batch(problem, make_samples(problem), config)
    arguments = training_arguments(
        config, folder, micro_batch_size=problem.rows, accumulation=1, report_to=[], name="bench"
    )
    arguments.set_save("no")
    trainer = StageTrainer(
        policy.model,
        arguments,
        FixedSource([batch]),
        lambda model, batch, meter: grpo_loss(policy, config, model, batch, meter),
        MetricsFile(folder / "metrics.jsonl"),
        Meter(),
        [callback],
    )
    trainer.train()


def make_batch(problem: StepProblem, sampled: Sampled, config: GrpoStage) -> GrpoBatch:
    """The step's rows with advantages and weights. The mismatch gate is off: nothing was sampled."""
    trajectory, settings = make_trajectory(problem, sampled), config.objective.advantage
    result = group_advantages(
        sampled.reward_B.double().numpy(),
        [True] * problem.rows,
        trajectory.group_id,
        baseline=settings.baseline,
        scale=settings.scale,
        flat_groups=settings.flat_groups,
    )
    kept_B = torch.from_numpy(result.kept_B)
    weight_BS = token_weights(
        config.objective.objective().weights,
        trajectory.target_mask,
        kept_B,
        totals=count_totals(trajectory.target_mask, kept_B),
        max_length=problem.image_tokens,
    )
    return GrpoBatch(trajectory, torch.from_numpy(result.advantage_B).float(), kept_B, weight_BS, gate=False)
