"""Steps of the stages' own trainer, without a stage."""

from pathlib import Path
from typing import Any

from torch import nn

from rlmm.config.optimization import Optimization
from rlmm.train.metrics import Meter, MetricsFile
from rlmm.train.trainer import LossFn, StageTrainer, StepSource, training_arguments


def take_steps(
    model: nn.Module, source: StepSource, loss: LossFn, folder: Path, settings: Optimization, **extra: Any
) -> list[dict[str, float]]:
    """Train the model as the settings say; the lines of its metrics. `extra`: the trainer's."""
    arguments = training_arguments(
        settings, folder, micro_batch_size=1, accumulation=source.micro_batches_per_step, report_to=(), name="steps"
    )
    metrics = MetricsFile(folder / "metrics.jsonl")
    StageTrainer(model, arguments, source, loss, metrics, Meter(), **extra).run(lambda _: None)
    return metrics.read()
