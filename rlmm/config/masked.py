"""What only stages of a masked policy say: how an image is revealed, how one is masked to learn from, and what a
log-prob is estimated by."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rlmm.config.base import Strict
from rlmm.objectives.estimators import Estimator, Upper
from rlmm.objectives.noise import Scheme, Weighting, check_draws
from rollouts.schedules import Schedule, check_schedule
from rollouts.unmasking import Order, Unmasking


class UnmaskingConfig(Strict):
    """How an image is revealed."""

    steps: int = Field(..., ge=1)
    """Forward passes an image; each reveals at least one position (under ancestral, as chance has it)."""
    order: Order = "random"
    """random, blocks and ancestral say nothing about the policy, so a sample's log-prob is its tokens' own: the default
    for RL. confidence and threshold reveal what the policy is surest of, and that choice is part of the log-prob.
    noisy_confidence (MaskGIT's) has no known log-prob: for evaluation."""
    schedule: Schedule = "cosine"
    block: int | None = Field(None, ge=1)
    """Positions of a block, under order: blocks."""
    noise: float = Field(0.0, ge=0)
    """Scale of the Gumbel noise at the first step, under order: noisy_confidence; it falls linearly to 0."""
    threshold: float | None = Field(None, gt=0, le=1)
    """Under order: threshold, the probability from which a proposal is kept."""

    @model_validator(mode="after")
    def _fits(self) -> "UnmaskingConfig":
        self.record()
        return self

    def record(self) -> Unmasking:
        """ValueError where the settings contradict each other."""
        return Unmasking(self.steps, self.order, self.schedule, self.block, self.noise, self.threshold)


class NoiseConfig(Strict):
    """How supervised images are masked."""

    schedule: Annotated[Schedule, AfterValidator(check_schedule)] = "linear"
    """The mask ratio is the schedule at a time drawn evenly: linear makes every count as likely, cosine more of the
    high ones."""
    weighting: Weighting = "elbo"
    """elbo: the loss is a bound of the negative log-likelihood under any schedule. mean: the mean over masked tokens
    (MaskGIT, Show-o, MMaDA), which is no bound."""
    complementary: bool = False
    """Show each image twice, with a mask and with its complement, so that every token is learned from."""


class UpperConfig(Strict):
    """SPG's upper estimate, arXiv 2510.09541."""

    beta: float = Field(1.5, ge=1)
    share: float = Field(0.5, gt=0, le=1)


class EstimatorConfig(Strict):
    """What a log-prob of a rollout is."""

    kind: Literal["trajectory"] | Scheme = "trajectory"
    """trajectory: the sampled chain's own, one forward a step. count, stratified, complement, quadrature and bernoulli
    estimate the ELBO; mean_field, coupled and truncated are published baselines."""
    draws: int = Field(1, ge=1)
    """Masks a sample, of all kinds but trajectory."""
    ratios: tuple[float, float] | None = None
    """Range of the mask ratio, of kind truncated."""
    steps: int | None = Field(None, ge=1)
    """Of kind trajectory: how many of its steps are evaluated, drawn anew each rollout; null: all."""
    order_term: bool = True
    """Of kind trajectory under order confidence or threshold: false leaves out the order's log-prob, as published
    trainers do; what is left is no likelihood of what was sampled."""
    upper: UpperConfig | None = None
    """Samples with a negative advantage are pushed by an upper estimate, too (SPG): for objective reinforce, on an
    ELBO."""
    force: bool = False
    """Run a baseline whose log-prob the objective cannot soundly use."""

    @model_validator(mode="after")
    def _fits(self) -> "EstimatorConfig":
        along = self.kind == "trajectory"
        if self.kind != "trajectory":
            check_draws(self.kind, self.draws)
        if (along and self.draws != 1) or (not along and self.steps is not None):
            raise ValueError("draws are of noise schemes, and steps of kind trajectory; leave the other one out")
        if not along and not self.order_term:
            raise ValueError("order_term is of kind trajectory: a noise scheme has no order's log-prob; leave it out")
        if (self.kind == "truncated") != (self.ratios is not None):
            raise ValueError("ratios belong to kind truncated, which needs them, and to no other")
        if self.upper is not None and self.draws < 2:
            raise ValueError(
                "upper is a mean over draws inside a logarithm, which one draw leaves empty; give draws >= 2"
            )
        if self.ratios is not None and not 0 <= self.ratios[0] < self.ratios[1] <= 1:
            raise ValueError(f"ratios {self.ratios} is no range within [0, 1]")
        return self

    def record(self) -> Estimator:
        upper = None if self.upper is None else Upper(self.upper.beta, self.upper.share)
        return Estimator(self.kind, self.draws, self.ratios, self.steps, upper, self.order_term)
