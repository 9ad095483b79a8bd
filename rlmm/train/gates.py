"""What stops a run: a loss that differentiates another law than was sampled, and a signal that is not there."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmm.config.stages import Gates

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}
MAX_FACTOR = 100.0


class GateError(RuntimeError):
    """A gate stopped the run; the text says what was measured, why it matters and what to do."""


@dataclass(frozen=True)
class Mismatch:
    """|trainer - sampler| log-prob over decided tokens, in nats."""

    total: float
    count: int
    largest: float

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)


def measure_mismatch(logp_BS: Tensor, sampler_logp_BS: Tensor, target_BS: Tensor) -> Mismatch:
    """Float64 differences of log-probs [B, S] over the targets."""
    gap = (logp_BS.detach().double() - sampler_logp_BS.double())[target_BS].abs()
    if not gap.numel():
        return Mismatch(0.0, 0, 0.0)
    return Mismatch(float(gap.sum()), gap.numel(), float(gap.max()))


def ceilings(gates: Gates, precision: str) -> dict[str, float]:
    """Metric name -> the value above which its gate acts, defaults resolved."""
    mean = gates.mismatch_mean if gates.mismatch_mean is not None else TOLERANCE[precision]
    largest = gates.mismatch_max if gates.mismatch_max is not None else MAX_FACTOR * mean
    shares = {name: getattr(gates, limit) for name, (limit, _) in SHARES.items()}
    canary = {} if gates.canary_drift is None else {"canary/drift": gates.canary_drift}
    return {"mismatch/mean": mean, "mismatch/max": largest, **shares, **canary}


def check_mismatch(found: Mismatch, gates: Gates, precision: str, *, corrected: bool = False) -> None:
    """Before the first update of a rollout the trainer's log-probs must be the sampler's.

    Raises GateError past the tolerance, unless off-policy training was asked for or the loss is `corrected` by
    importance weights.
    """
    limits = ceilings(gates, precision)
    mean_limit, max_limit = limits["mismatch/mean"], limits["mismatch/max"]
    within = found.mean <= mean_limit and found.largest <= max_limit
    if within or corrected or gates.off_policy == "allow":
        return
    raise GateError(
        f"the trainer's log-probs are not the sampler's: |difference| mean {found.mean:.3g} (limit {mean_limit:.3g}), "
        f"max {found.largest:.3g} (limit {max_limit:.3g}) nats over {found.count} tokens. The loss would differentiate "
        "another law than the one sampled from. Sample and train under one law (sampling.guidance: none or guided), "
        "raise gates.mismatch_mean if this is rounding at your precision, correct for it with objective.mismatch, or "
        "set gates.off_policy: allow to train on the mismatch knowingly."
    )


SHARES = {
    "group/flat_share": (
        "flat_share",
        "nearly every group has one reward for all its samples, so there is nothing to learn from; look at the images, "
        "then at the reward's resolution, the temperature or the difficulty of the prompts",
    ),
    "sample/unavailable_share": (
        "unavailable_share",
        "the reward fails on most samples; the rollout files hold each sample's reason",
    ),
    "sample/duplicate_share": (
        "duplicate_share",
        "nearly all samples of a group are the same tokens; raise the temperature or look for a collapsed policy",
    ),
}


def check_shares(history: list[dict[str, Any]], present: dict[str, float], gates: Gates) -> None:
    """Stop after `patience` rollouts in a row above a ceiling. `history`: the metrics of earlier steps."""
    rows = [row for row in history if "group/flat_share" in row][-(gates.patience - 1) :] if gates.patience > 1 else []
    if len(rows) + 1 < gates.patience:
        return
    for name, (limit_name, meaning) in SHARES.items():
        limit = getattr(gates, limit_name)
        values = [row.get(name) for row in rows] + [present.get(name)]
        if all(value is not None and value > limit for value in values):
            raise GateError(
                f"{name} was above {limit} for {gates.patience} rollouts in a row (now {present[name]:.3f}): "
                f"{meaning}. "
                f"The ceiling is gates.{limit_name}."
            )


def finite(value: Tensor, what: str, step: int) -> None:
    """Raises GateError on a loss or gradient that is not a number, before it reaches the weights."""
    if not torch.isfinite(value):
        raise GateError(
            f"the {what} is {float(value.detach())} at step {step}; no update was made. Lower the learning "
            "rate, and look at the last metrics (after GRPO also at the last rollout file)"
        )
