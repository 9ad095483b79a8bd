"""The parts an objective is made of, and the objectives with a name."""

from dataclasses import dataclass
from typing import Literal

Baseline = Literal["mean", "leave_one_out", "batch_mean"]
Scale = Literal["group_std", "batch_std", "none"]
FlatGroups = Literal["drop", "count"]
WeightKind = Literal["grpo", "dr_grpo", "dapo", "rloo"]
Level = Literal["token", "sequence"]
Surrogate = Literal["clipped", "cispo", "reinforce"]
KLKind = Literal["k1", "k2", "k3"]
Correction = Literal["truncate", "mask", "reject"]
Family = Literal["token_ratio", "sequence_ratio", "ratio_free", "dpo", "token_kl", "bound_kl"]

DPO_FAMILY: Family = "dpo"


@dataclass(frozen=True)
class Objective:
    """A policy-gradient objective: how advantages are made, how tokens are weighed, where the ratio is
    clipped.

    The loss of an optimiser step is `sum(token_weights(weights) * POLICY_LOSSES[surrogate](...))` with the
    advantages of `group_advantages(baseline, scale, flat_groups)`; a KL term is added under the same weights.
    """

    name: str
    baseline: Baseline
    scale: Scale
    weights: WeightKind
    flat_groups: FlatGroups
    clip_low: float = 0.2
    clip_high: float = 0.2
    level: Level = "token"
    surrogate: Surrogate = "clipped"

    @property
    def family(self) -> Family:
        """The row of the legality table this objective stands in."""
        if self.surrogate == "reinforce":
            return "ratio_free"
        return "token_ratio" if self.level == "token" else "sequence_ratio"


# Flat groups: an advantage divided by the group's std is undefined at std 0, so such a group leaves the mean
# (DAPO's dynamic sampling, without the refill). The two unscaled objectives are unbiased only when it stays
# in the denominator: dropping it multiplies each prompt's gradient by a factor that grows with its chance to
# be flat.
OBJECTIVES: dict[str, Objective] = {
    # DeepSeekMath, arXiv 2402.03300, eq. 3-4
    "grpo": Objective("grpo", baseline="mean", scale="group_std", weights="grpo", flat_groups="drop"),
    # Understanding R1-Zero-like training, arXiv 2503.20783, section 3.2
    "dr_grpo": Objective("dr_grpo", baseline="mean", scale="none", weights="dr_grpo", flat_groups="count"),
    # DAPO, arXiv 2503.14476, eq. 8-12: clip-higher, token mean, dynamic sampling
    "dapo": Objective("dapo", baseline="mean", scale="group_std", weights="dapo", flat_groups="drop", clip_high=0.28),
    # Back to basics, arXiv 2402.14740, eq. 7
    "rloo": Objective("rloo", baseline="leave_one_out", scale="none", weights="rloo", flat_groups="count"),
    # DAPO's token mean without its clip-higher, as TRL's loss_type "bnpo"; here over the whole step, not a micro-batch
    "bnpo": Objective("bnpo", baseline="mean", scale="group_std", weights="dapo", flat_groups="drop"),
    # GSPO, arXiv 2507.18071, eq. 5-7; clips of section 5.1
    "gspo": Objective(
        "gspo",
        baseline="mean",
        scale="group_std",
        weights="grpo",
        flat_groups="drop",
        clip_low=3e-4,
        clip_high=4e-4,
        level="sequence",
    ),  # fmt: skip
    # CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4-5: no lower bound, and every token keeps its gradient; the upper bound
    # of 5 is that of arXiv 2510.13786
    "cispo": Objective(
        "cispo",
        baseline="mean",
        scale="group_std",
        weights="dapo",
        flat_groups="drop",
        clip_low=1.0,
        clip_high=4.0,
        surrogate="cispo",
    ),  # fmt: skip
    # REINFORCE (Williams 1992) with the group's advantages and no ratio: what a log-prob that is no likelihood, or a
    # bound, may drive (wd1, arXiv 2507.08838; SPG, arXiv 2510.09541)
    "reinforce": Objective(
        "reinforce", baseline="mean", scale="group_std", weights="grpo", flat_groups="drop", surrogate="reinforce"
    ),
    # REINFORCE++, arXiv 2501.03262: baseline and scale of the whole batch, so a group without spread teaches, too
    "reinforce++": Objective(
        "reinforce++", baseline="batch_mean", scale="batch_std", weights="grpo", flat_groups="count"
    ),
}
