"""The trainer every stage uses: transformers.Trainer through its public methods, fed one optimizer step at a time.

A stage gives a `StepSource` (step -> this process's micro-batches) and a loss whose micro-batch values add up to the
step's loss, so the result does not depend on how the step was cut. Everything random comes from counters, so the step
number is the whole state of the data.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from rlmm.config.stages import Optimization
from rlmm.train.agreement import GradientAgreement
from rlmm.train.checkpoint import step_of, write_manifest
from rlmm.train.faults import storing
from rlmm.train.gates import finite
from rlmm.train.guard import Guard
from rlmm.train.heart import beat, settle
from rlmm.train.metrics import Meter, MetricsFile
from rlmm.train.processes import wait
from rlmm.train.signals import StopWhenAsked, leaving, stop_if_asked


class StepSource(Protocol):
    """Makes the micro-batches of optimizer step `step` (0-based); always the same number of them."""

    micro_batches_per_step: int
    nothing_counts: bool
    """Whether the last step made has no weight anywhere, so that no update must be made."""

    def micro_batches(self, step: int) -> Sequence[Any]: ...


LossFn = Callable[[nn.Module, Any, Meter], Tensor]
"""(wrapped model, micro-batch, meter) -> this micro-batch's share of the step's loss (summed, not averaged)."""


class StepLoader:
    """Yields micro-batches from the trainer's present step on. It has a length because Trainer plans with it."""

    def __init__(self, trainer: "StageTrainer") -> None:
        self.trainer = trainer

    def __len__(self) -> int:
        return self.trainer.args.max_steps * self.trainer.source.micro_batches_per_step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in range(self.trainer.state.global_step, self.trainer.args.max_steps):
            settle("data", step + 1)
            batches = self.trainer.source.micro_batches(step)
            expected = self.trainer.source.micro_batches_per_step
            if len(batches) != expected:
                raise RuntimeError(f"step {step} gave {len(batches)} micro-batches where {expected} were planned")
            self.trainer.step_started = time.perf_counter()
            settle("update", step + 1)
            for batch in batches:
                yield {"batch": batch}


class _Seal(TrainerCallback):
    """Writes the manifest once every process has written its part."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        settle("figures and checkpoint", state.global_step)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        wait()
        if state.is_world_process_zero:
            write_manifest(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")


class StageTrainer(Trainer):
    """See the module's text. `loss_fn` results are sums; the data-parallel mean is undone by the world size."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        source: StepSource,
        loss_fn: LossFn,
        metrics: MetricsFile,
        meter: Meter,
        callbacks: Sequence[TrainerCallback] = (),
        gradient_agreement: bool = False,
    ) -> None:
        self.source, self.loss_fn, self.metrics, self.meter = source, loss_fn, metrics, meter
        self.step_started = time.perf_counter()
        self.stop = StopWhenAsked()
        halves = GradientAgreement(model.parameters(), source.micro_batches_per_step) if gradient_agreement else None
        self.agreement = halves
        self.guard = Guard(source)
        super().__init__(model=model, args=args, callbacks=[*callbacks, self.guard, self.stop, _Seal()])
        self.remove_callback(PrinterCallback)
        # As long as it is set, transformers loads every model (a reward's, the next stage's) in parts of this one's.
        unset_hf_deepspeed_config()

    def get_train_dataloader(self) -> Any:
        return StepLoader(self)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        beat()
        batch = inputs["batch"].to(self.args.device)
        loss = self.loss_fn(model, batch, self.meter)
        finite(loss, "loss", self.state.global_step + 1)
        return loss * self.args.world_size

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch; gradients are whole, and not yet clipped, after a step's last."""
        self.guard.before_forward(model)
        loss = super().training_step(model, *args, **kwargs)
        if self.agreement is not None:
            self.meter.put(self.agreement.after_backward())
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: inputs are records, not tensors by name."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line a step: the trainer's figures and the meter's. Summaries at the end of training are not steps."""
        if "grad_norm" in logs:
            figures = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            figures |= {"time/update": time.perf_counter() - self.step_started}
            logs = figures | self.meter.flush()
            if self.is_world_process_zero():
                self.metrics.append(self.state.global_step, logs)
        super().log(logs, start_time)
        # Trainer keeps every figure of every step, and writes them into each checkpoint: metrics.jsonl has them.
        del self.state.log_history[:-1]

    def run(self, say: Callable[[str], None], checkpoint: Path | None = None) -> None:
        """Train from `checkpoint`, or from the start. Raises Stopped, once a checkpoint is sealed, where the run was
        asked to stop."""
        folder, step = Path(self.args.output_dir or "."), step_of(checkpoint) if checkpoint else 0
        if self.is_world_process_zero():
            self.metrics.cut(step)
        if checkpoint is not None:
            say(f"resuming from step {step} of {self.args.max_steps}")
        with leaving(at_once=False), storing("a file of the stage", folder):
            stop_if_asked()
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            settle("after training", patient=True)
            self.stop.check()


def training_arguments(
    config: Optimization, folder: Path, *, micro_batch_size: int, accumulation: int, report_to: Sequence[str], name: str
) -> TrainingArguments:
    """Trainer's own settings from a stage's. Saving, logging and schedules are Trainer's; data order is ours."""
    # accelerate sets it for a stage with a DeepSpeed file, and Trainer would take it as an order to the next one.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return TrainingArguments(
        output_dir=str(folder),
        run_name=name,
        max_steps=config.steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.max_grad_norm if config.max_grad_norm > 0 else math.inf,
        gradient_checkpointing=config.gradient_checkpointing,
        deepspeed=config.deepspeed,
        ddp_find_unused_parameters=False,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=config.checkpoints_kept,
        report_to=list(report_to),
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        ignore_data_skip=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
