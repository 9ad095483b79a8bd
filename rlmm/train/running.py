"""The part every training stage shares: build the trainer, run or resume it, and leave its result sealed."""

from collections.abc import Sequence

from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from rlmm.train.context import StageContext
from rlmm.train.metrics import Meter, MetricsFile
from rlmm.train.progress import RichProgress
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
) -> StageTrainer:
    """Train `model` for the stage's steps, from its newest good checkpoint where there is one.

    `show`: the metric names that a step's line prints. `gradient_agreement`: log that of the step's halves.
    """
    trackers = context.recipe.runtime.trackers
    arguments = training_arguments(
        context.config,
        context.folder / "checkpoints",
        micro_batch_size=micro_batch_size,
        accumulation=source.micro_batches_per_step,
        report_to=[tracker for tracker in trackers if tracker != "tensorboard"],
        name=f"{context.recipe.name}-{context.name}",
    )
    metrics = MetricsFile(context.folder / "metrics.jsonl")
    progress = RichProgress(context.name, show, every=context.recipe.runtime.log_every)
    callbacks: list[TrainerCallback] = [progress]
    if "tensorboard" in trackers:
        # Beside the metrics, not inside the checkpoints, which a finished stage drops.
        callbacks.append(TensorBoardCallback(SummaryWriter(str(context.folder / "tensorboard"))))
    trainer = StageTrainer(
        model, arguments, source, loss_fn, metrics, meter, callbacks, gradient_agreement=gradient_agreement
    )
    trainer.run(context.say)
    return trainer
