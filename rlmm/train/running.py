"""The part every training stage shares: build the trainer, run or resume it, and leave its result sealed."""

from collections.abc import Sequence

from torch import nn
from transformers import TrainerCallback

from rlmm.train.checkpoint import step_of
from rlmm.train.context import StageContext
from rlmm.train.metrics import Meter, MetricsFile
from rlmm.train.progress import RichProgress
from rlmm.train.resume import Fault, no_fault, resume_point
from rlmm.train.trackers import others, tensorboard, wandb_run
from rlmm.train.trainer import LossFn, StageTrainer, StepSource, training_arguments


def train(
    context: StageContext,
    model: nn.Module,
    source: StepSource,
    loss_fn: LossFn,
    meter: Meter,
    *,
    micro_batch_size: int,
    show: Sequence[str],
    gradient_agreement: bool = False,
    resume_fault: Fault = no_fault,
    callbacks: Sequence[TrainerCallback] = (),
) -> StageTrainer:
    """Train `model` for the stage's steps, from its newest good checkpoint where there is one.

    `show`: the metric names that a step's line prints. `gradient_agreement`: log that of the step's halves.
    `resume_fault`: why the data that follow a step cannot be had, so that an earlier checkpoint is to be used.
    `callbacks`: the stage's own; what they write into a checkpoint's folder when it is saved is sealed with it.
    """
    checkpoint = resume_point(context.folder / "checkpoints", context.say, resume_fault)
    arguments = training_arguments(
        context.config,
        context.folder / "checkpoints",
        micro_batch_size=micro_batch_size,
        accumulation=source.micro_batches_per_step,
        report_to=others(context),
        name=f"{context.recipe.name}-{context.name}",
    )
    metrics = MetricsFile(context.folder / "metrics.jsonl")
    progress = RichProgress(context.name, show, every=context.recipe.runtime.log_every)
    every = [progress, *tensorboard(context, step_of(checkpoint) if checkpoint else 0), *callbacks]
    trainer = StageTrainer(
        model, arguments, source, loss_fn, metrics, meter, every, gradient_agreement=gradient_agreement
    )
    with wandb_run(context):
        trainer.run(context.say, checkpoint)
    return trainer
