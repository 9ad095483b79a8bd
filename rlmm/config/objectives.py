"""The objective of a policy-gradient stage; what is not given takes the named objective's value."""

from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from rlmm.config.base import Strict, nearest
from rlmm.objectives.records import (
    OBJECTIVES,
    Baseline,
    Correction,
    FlatGroups,
    KLKind,
    Level,
    Objective,
    Scale,
    Surrogate,
)


class KLConfig(Strict):
    """The penalty that holds the policy near the reference, under the objective's token weights."""

    kind: KLKind = "k3"
    """k3 as published: its gradient is that of KL(reference || policy). k2: the gradient of KL(policy ||
    reference)."""
    coefficient: float = Field(default=0.0, ge=0)
    """0 turns it off: no reference is kept."""
    importance_weighted: bool = False
    """Weigh by the ratio to the sampling policy: k1 and k3 then have KL(policy || reference)'s value and
    gradient, in later updates of a rollout too."""

    @model_validator(mode="after")
    def _refuse_wrong_gradients(self) -> "KLConfig":
        if self.coefficient and self.kind == "k1" and not self.importance_weighted:
            raise ValueError(
                "kl.kind k1 has an expected gradient of 0 as a loss: it adds noise and holds the policy"
                " nowhere; set importance_weighted: true, or use k2 or k3"
            )
        if self.kind == "k2" and self.importance_weighted:
            raise ValueError(
                "kl.kind k2 weighted by the ratio has neither the value nor the gradient of the KL;"
                " use k1 or k3 with importance_weighted, or k2 without"
            )
        return self


class AdvantageConfig(Strict):
    """Rewards of a group -> advantages."""

    baseline: Baseline
    scale: Scale
    flat_groups: FlatGroups
    """Whether a group without spread leaves the loss's denominators (drop) or stays in them (count)."""
    std_floor: float = Field(default=1e-6, ge=0)
    """A group with a standard deviation at or below this (in units of the reward) is flat and gives no
    gradient."""
    clip: float | None = Field(default=None, gt=0)
    """Bound on the advantage's absolute value."""

    @model_validator(mode="after")
    def _a_batch_mean_has_a_batch_scale(self) -> "AdvantageConfig":
        if self.baseline == "batch_mean" and self.scale == "group_std":
            raise ValueError(
                "baseline batch_mean gives a group without spread a signal, which scale group_std would divide by 0;"
                " use batch_std or none"
            )
        return self


class MismatchConfig(Strict):
    """Importance weights between sampler and trainer, for rollouts whose arithmetic is not the trainer's (a vLLM engine
    in bfloat16, a quantised one), or whose weights were a step older (`max_staleness`). With it the mismatch gate
    measures and does not stop; but it does under `max_staleness`, where both sides' arithmetic on the same weights is
    compared."""

    kind: Correction
    """truncate: a token's ratio, at most `high`. mask: the ratio, and 0 outside [low, high]. reject: 0 for a whole row
    whose mean ratio is outside."""
    low: float = Field(default=0.5, ge=0, lt=1)
    high: float = Field(default=2.0, gt=1)


class EntropyConfig(Strict):
    """A bonus for each decision's entropy, under the objective's token weights (PPO, arXiv 1707.06347, eq. 9)."""

    coefficient: float = Field(default=0.0, ge=0)
    floor: float | None = Field(default=None, gt=0)
    """Nats a token: the bonus acts only in steps after one whose mean entropy was at or below this. Null: always."""

    @model_validator(mode="after")
    def _a_floor_needs_a_coefficient(self) -> "EntropyConfig":
        if self.floor is not None and not self.coefficient:
            raise ValueError(
                "entropy.floor without a coefficient would do nothing; set entropy.coefficient, or drop it"
            )
        return self


class ObjectiveConfig(Strict):
    """A named objective, any part of it replaceable."""

    name: str = "grpo"
    level: Level
    """The ratio's level. At `sequence` (GSPO) ratios are geometric means: clips belong near 3e-4."""
    clip_low: float = Field(gt=0, le=1)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(gt=0)
    """The ratio is clipped above 1 + clip_high."""
    surrogate: Surrogate
    """clipped: a token whose ratio is past the clip has no gradient. cispo: the ratio is a bounded weight, and every
    token keeps its gradient. reinforce: no ratio."""
    advantage: AdvantageConfig
    kl: KLConfig = KLConfig()
    entropy: EntropyConfig = EntropyConfig()
    token_weighting: str | None = None
    """Your own function of a `TokenView`, path/file.py:name or module:name; its factors multiply the token weights."""
    mismatch: MismatchConfig | None = None
    """Null: trainer and sampler must agree, which the mismatch gate sees to."""
    updates_per_rollout: int = Field(default=1, ge=1)
    """Optimiser steps on each set of rollouts; with 1 the ratio is 1 and the clip is idle."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        name = data.get("name", "grpo")
        if name not in OBJECTIVES:
            raise ValueError(f"unknown objective {name!r}.{nearest(str(name), list(OBJECTIVES))}")
        named = OBJECTIVES[name]
        filled = {"level": named.level, "clip_low": named.clip_low, "clip_high": named.clip_high}
        filled |= {"surrogate": named.surrogate} | data
        given = data.get("advantage", {})
        if isinstance(given, dict):
            parts = {"baseline": named.baseline, "scale": named.scale, "flat_groups": named.flat_groups}
            filled["advantage"] = parts | given
        return filled

    @model_validator(mode="after")
    def _no_ratio_has_no_settings(self) -> "ObjectiveConfig":
        named = OBJECTIVES[self.name]
        own = (self.level, self.clip_low, self.clip_high) != (named.level, named.clip_low, named.clip_high)
        if self.surrogate == "reinforce" and own:
            raise ValueError(
                "surrogate reinforce has no ratio, so level, clip_low and clip_high do nothing; leave them out"
            )
        return self

    def objective(self) -> Objective:
        """The named objective with this config's values in it."""
        return replace(
            OBJECTIVES[self.name],
            level=self.level,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            surrogate=self.surrogate,
            baseline=self.advantage.baseline,
            scale=self.advantage.scale,
            flat_groups=self.advantage.flat_groups,
        )
