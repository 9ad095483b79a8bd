"""Losses of preferences: on pairs of sequence log-probs (DPO, IPO, hinge), or on single ones (KTO).

P pairs, B sequences. A log-ratio is log pi - log reference, of a whole sequence or a token's mean.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Loss = Literal["sigmoid", "ipo", "hinge"]


class DPOLoss(NamedTuple):
    """Loss of each pair [P] or sequence [B], and the health figures of each by name."""

    loss_P: Tensor
    figures: dict[str, Tensor]


def _sigmoid(gap_P: Tensor, beta: float) -> Tensor:
    return -logsigmoid(beta * gap_P)


def _ipo(gap_P: Tensor, beta: float) -> Tensor:
    return (gap_P - 1 / (2 * beta)).square()


def _hinge(gap_P: Tensor, beta: float) -> Tensor:
    return (1 - beta * gap_P).clamp(min=0)


LOSSES: dict[Loss, Callable[[Tensor, float], Tensor]] = {"sigmoid": _sigmoid, "ipo": _ipo, "hinge": _hinge}
"""Of h, the log-ratio of what was chosen minus that of what was rejected. sigmoid: -log sigmoid(beta h) (arXiv
2305.18290, eq. 7). ipo: (h - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17). hinge: max(0, 1 - beta h) (SLiC, arXiv
2305.10425, as a loss of log-ratios in arXiv 2309.06657)."""


def noise_bias(kind: Loss | Literal["kto"], beta: float, variance_P: Tensor) -> Tensor:
    """A bound on how much noise of this variance in h (in the log-ratio, for kto) biases the loss [P], in expectation.

    The loss's greatest curvature times half the variance (beta^2 / 4 for sigmoid, as in LLaDA 1.5, arXiv 2505.19223; 2
    for ipo, where it is the bias itself; beta^2 / (6 sqrt 3) for kto); half of beta deviations for the hinge's kink.
    """
    if kind == "hinge":
        return beta * variance_P.sqrt() / 2
    curvature = {"sigmoid": beta**2 / 4, "ipo": 2.0, "kto": beta**2 / (6 * 3**0.5)}[kind]
    return curvature * variance_P / 2


def dpo_loss(
    policy_chosen_P: Tensor,
    policy_rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    beta: float,
    *,
    kind: Loss = "sigmoid",
    label_smoothing: float = 0.0,
    lengths_P: tuple[Tensor, Tensor] | None = None,
) -> DPOLoss:
    """The loss of h, as `LOSSES` has it. Inputs: log-probs of whole sequences [P].

    `label_smoothing` e in [0, 0.5): (1-e) loss(h) + e loss(-h), where a share e of the labels is taken to be wrong
    (conservative DPO). `lengths_P`: decided tokens of (chosen, rejected); each log-ratio is divided by its own, so that
    beta is a token's. Raises ValueError where beta or label_smoothing is out of range, or a side decides nothing.
    """
    if beta <= 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta {beta} must be positive and label_smoothing {label_smoothing} in [0, 0.5)")
    chosen_P = policy_chosen_P - reference_chosen_P.detach()
    rejected_P = policy_rejected_P - reference_rejected_P.detach()
    if lengths_P is not None:
        chosen_P, rejected_P = _per_token(chosen_P, lengths_P[0]), _per_token(rejected_P, lengths_P[1])
    gap_P = chosen_P - rejected_P
    loss_P = (1 - label_smoothing) * LOSSES[kind](gap_P, beta)
    if label_smoothing:
        loss_P = loss_P + label_smoothing * LOSSES[kind](-gap_P, beta)
    won_P, lost_P = (beta * ratio_P.detach().double() for ratio_P in (chosen_P, rejected_P))
    return DPOLoss(
        loss_P,
        {
            "correct": (won_P > lost_P).double(),
            "margin": won_P - lost_P,
            "chosen_reward": won_P,
            "rejected_reward": lost_P,
        },
    )


def kto_loss(
    policy_B: Tensor,
    reference_B: Tensor,
    desirable_B: Tensor,
    beta: float,
    point: float,
    *,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    lengths_B: Tensor | None = None,
) -> DPOLoss:
    """w (1 - sigmoid(s beta (r - point))) with s = 1 for the wanted (bool [B]) and -1 for the others, r the log-ratio
    and w the weight of its kind (KTO, arXiv 2402.01306, section 4.1).

    `point`: the reference point, the policy's divergence from its reference in nats (a token's, with `lengths_B`); it
    has no gradient. Raises ValueError where beta is not positive, the point is negative or a row decides nothing.
    """
    if beta <= 0 or point < 0:
        raise ValueError(f"beta {beta} must be positive and the reference point {point}, a divergence, not negative")
    ratio_B = policy_B - reference_B.detach()
    if lengths_B is not None:
        ratio_B = _per_token(ratio_B, lengths_B)
    wanted_B = desirable_B.to(ratio_B)
    sign_B = 2 * wanted_B - 1
    weight_B = desirable_weight * wanted_B + undesirable_weight * (1 - wanted_B)
    loss_B = weight_B * torch.sigmoid(-sign_B * beta * (ratio_B - point))
    reward_B = beta * ratio_B.detach().double()
    return DPOLoss(loss_B, {"correct": (sign_B.double() * (reward_B - beta * point) > 0).double(), "reward": reward_B})


def _per_token(ratio_P: Tensor, length_P: Tensor) -> Tensor:
    if int(length_P.min()) < 1:
        raise ValueError("a pair has a side without decided tokens: it cannot be normalised by its length; drop it")
    return ratio_P / length_P
