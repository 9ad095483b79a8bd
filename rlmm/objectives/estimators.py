"""What estimates a masked policy's log-prob of a sequence: its sampled trajectory, or a noise plan."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlmm.objectives.legality import LogProbKind
from rlmm.objectives.noise import SCHEME_KINDS, NoisePlan, Scheme, noise_plan
from rlmm.seeds import generator
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class Upper:
    """SPG's evidence upper estimate (arXiv 2510.09541, eq. 9) with exponent `beta`, of which samples with a negative
    advantage get `share`, and the lower one the rest."""

    beta: float = 1.5
    share: float = 0.5


@dataclass(frozen=True)
class Estimator:
    """scheme: `trajectory`, or a noise scheme. draws: masks a row of a noise scheme. ratios: of `truncated`. steps: how
    many steps of a trajectory are evaluated; None: all. upper: the other side of a sandwich. order_term: whether the
    log-prob of the order that the policy's confidence chose is part of a trajectory's; without it the tokens' own are
    read, each as if it had been revealed whatever the others proposed."""

    scheme: Scheme | Literal["trajectory"] = "trajectory"
    draws: int = 1
    ratios: tuple[float, float] | None = None
    steps: int | None = None
    upper: "Upper | None" = None
    order_term: bool = True

    @property
    def kind(self) -> LogProbKind:
        if self.scheme == "trajectory":
            return LogProbKind.TRAJECTORY if self.order_term else LogProbKind.SURROGATE
        return SCHEME_KINDS[self.scheme]

    def plan(self, trajectory: Trajectory) -> NoisePlan:
        """The masks of a trajectory's rows, a function of their seeds."""
        if self.scheme == "trajectory":
            raise ValueError("a trajectory's states are the sampled ones; only noise schemes have a plan")
        return noise_plan(self.scheme, trajectory.target_mask, trajectory.seed, self.draws, ratios=self.ratios)


def upper_log_probs(logp_BnS: Tensor, weight_BnS: Tensor, beta: float) -> Tensor:
    """(1 / beta) log sum_n weight_n p_n^beta [B, S], the weights 1/n times L/k where masked; 0 for positions no draw
    masks. The log stands outside the mean over draws, and a constant is dropped: no upper bound of every sequence."""
    log_weight_BnS = weight_BnS.clamp_min(torch.finfo(weight_BnS.dtype).tiny).log()
    scaled_BnS = torch.where(weight_BnS > 0, beta * logp_BnS + log_weight_BnS, -torch.inf)
    seen_BS = (weight_BnS > 0).any(1)
    return torch.where(seen_BS, torch.where(seen_BS[:, None], scaled_BnS, 0.0).logsumexp(1) / beta, 0.0)


def sandwiched(lower_BS: Tensor, upper_BS: Tensor, advantage_B: Tensor, share: float) -> Tensor:
    """The lower estimate where the advantage is not negative, else (1 - share) lower + share upper [B, S]: what is to
    become likelier is pushed by a lower estimate, what is to become less likely partly by an upper one."""
    return torch.where(advantage_B[:, None] < 0, (1 - share) * lower_BS + share * upper_BS, lower_BS)


def plan_figures(plan: NoisePlan, target_BS: Tensor, logp_BnS: Tensor) -> dict[str, tuple[float, float]]:
    """noise/masked_q1 .. q4: the share of draws that mask up to a quarter of a row's targets, up to a half, and so on;
    noise/deviation: the standard deviation of a row's estimate over its draws, as if they were independent (nats; with
    two draws or more)."""
    rows, draws, _ = plan.masks_BnS.shape
    share_Bn = plan.masks_BnS.sum(-1) / target_BS.sum(1).clamp(min=1).cpu()[:, None]
    quarter_Bn = (share_Bn * 4).ceil().clamp(1, 4)
    counts = {quarter: float((quarter_Bn == quarter).sum()) for quarter in range(1, 5)}
    figures = {f"noise/masked_q{quarter}": (count, float(rows * draws)) for quarter, count in counts.items()}
    if draws > 1:
        estimate_Bn = (plan.weight_BnS.to(logp_BnS) * logp_BnS).sum(-1) * draws
        figures["noise/deviation"] = (float((estimate_Bn.var(1) / draws).sqrt().sum()), float(rows))
    return figures


def order_figures(trajectory: Trajectory) -> dict[str, tuple[float, float]]:
    """order/share: what part of the trajectories' log-prob is that of the order the policy's confidence chose."""
    assert trajectory.order_logp is not None, "called only where the order has one"
    whole = -float(trajectory.sampler_logp[trajectory.target_mask].sum())
    return {"order/share": (-float(trajectory.order_logp.sum()), whole)}


def step_weights(trajectory: Trajectory, steps: int | None) -> Tensor:
    """What each decision [B, S] (float64) of a trajectory weighs where only `steps` of its T steps are evaluated:
    T / `steps` in as many, drawn from the row's seed without replacement, 0 in the others; 1 everywhere for None.

    Sums over decisions keep their expectation (AGRPO, arXiv 2510.04019, with equal chances).
    """
    weight_BS = trajectory.target_mask.double()
    if steps is None:
        return weight_BS
    for row, seed in enumerate(trajectory.seed):
        present = trajectory.step[row][trajectory.target_mask[row]].unique()
        if len(present) > steps:
            picked = generator("steps", seed).permutation(len(present))[:steps]
            chosen_S = torch.isin(trajectory.step[row], present[torch.from_numpy(picked)])
            weight_BS[row] *= chosen_S * (len(present) / steps)
    return weight_BS
