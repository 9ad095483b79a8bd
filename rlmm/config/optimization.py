"""What every training stage says of its optimizer."""

from typing import Literal

from pydantic import Field, model_validator

from rlmm.config.base import Strict


class Optimization(Strict):
    """AdamW and its schedule."""

    steps: int = Field(..., ge=1)
    learning_rate: float = Field(..., gt=0)
    schedule: Literal["constant", "constant_with_warmup", "cosine", "linear"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, ge=0)
    """0 switches clipping off."""

    @model_validator(mode="after")
    def _warm_up_has_a_schedule(self) -> "Optimization":
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError("schedule constant has no warm-up; use constant_with_warmup, or set warmup_steps to 0")
        return self

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the transformer's body under autocast, in sampler and trainer alike."""
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(50, ge=1)
    checkpoints_kept: int = Field(2, ge=2)
    """At least two: should the newest be torn, the one before it is used."""
    deepspeed: str | None = None
    """Path of a DeepSpeed configuration file."""


def divides(total: int, part: int, total_name: str, part_name: str) -> None:
    """Raises ValueError where `part` is no divisor of `total`."""
    if total % part:
        raise ValueError(
            f"{total_name} = {total} is not a multiple of {part_name} = {part}; choose {part_name} among its divisors "
            f"{[d for d in range(1, total + 1) if total % d == 0]}"
        )
