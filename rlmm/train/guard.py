"""What stands between a step's gradient and the weights, however the weights are wrapped.

Both gates hang on the innermost optimizer, because that is where weights and moments move: a DeepSpeed engine steps by
itself at the end of the last backward, before Trainer calls anyone, and its gradients are not in the parameters.
"""

from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments

from rlmm.policies.parts import in_parts
from rlmm.train.gates import GateError, finite


class Counting(Protocol):
    """The part of a step's source that the guard reads."""

    nothing_counts: bool


class Guard(TrainerCallback):
    """Before the optimizer moves: stops on a gradient that is no number, and skips a step in which nothing counts.

    Without gradients AdamW leaves weights and moments as they are; with zeros its momentum would move them.
    """

    def __init__(self, source: Counting) -> None:
        self.source, self.step = source, 0
        self.used: UsedAlike | None = None
        self.withheld: list[tuple[Tensor, Tensor]] = []

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = innermost(kwargs["optimizer"])
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def before_forward(self, model: nn.Module) -> None:
        """To be called before every micro-batch, with the model as it is wrapped."""
        self.used = self.used or UsedAlike(model)
        self.used.begin(self.step)

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + 1

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Under ZeRO the step is over: it is left out, and said so here alone, where the gradient's norm over all
        processes is no number."""
        if kwargs["optimizer"].step_was_skipped and not self.source.nothing_counts:
            raise GateError(
                f"the gradient of some process is not finite at step {self.step}; no update was made. Lower the "
                "learning rate, and look at the last metrics (after GRPO also at the last rollout file)"
            )

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.used is not None:
            self.used.check(self.step)
        given = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not self.source.nothing_counts:
            for parameter in given:
                finite(parameter.grad.sum(), "gradient", self.step)
            return
        self.withheld = [(parameter, parameter.grad) for parameter in given]
        for parameter in given:
            parameter.grad = None

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer that DeepSpeed offloads keeps its gradients' buffers."""
        for parameter, gradient in self.withheld:
            parameter.grad = gradient
        self.withheld = []


class UsedAlike:
    """ZeRO-3 keeps gradients from step to step and replaces those that a micro-batch brings, so a weight that one of
    them does not use would take part with an old gradient: all must use the same. Nothing else is watched."""

    def __init__(self, model: nn.Module) -> None:
        self.now: set[str] | None = None
        self.first: set[str] | None = None
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and in_parts(parameter):
                parameter.register_post_accumulate_grad_hook(partial(self._note, name))

    def begin(self, step: int) -> None:
        """Of a micro-batch; the one before is over."""
        self.check(step)
        self.now = set()

    def check(self, step: int) -> None:
        """Raises GateError where the present micro-batch used other weights than the first one."""
        if self.now is None:
            return
        if self.first is None:
            self.first = self.now
        if other := sorted(self.now ^ self.first):
            raise GateError(
                f"at step {step} a micro-batch gave no gradient to a weight that others train ({other[0]}), and ZeRO-3 "
                "would use an old one; no update was made. Use ZeRO-2 (configs/deepspeed/zero2.json) for such batches"
            )

    def _note(self, name: str, parameter: Tensor) -> None:
        assert self.now is not None, "a gradient comes after a forward"
        self.now.add(name)


def innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside what accelerate and DeepSpeed wrap around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
