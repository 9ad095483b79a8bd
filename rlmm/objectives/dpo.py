"""Direct preference optimisation on pairs of sequence log-probs."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid


class DPOLoss(NamedTuple):
    """Loss [P] and sums of the health figures over the pairs; divide by `pairs` after adding parts up."""

    loss_P: Tensor
    metrics: dict[str, float]


def dpo_loss(
    policy_chosen_P: Tensor,
    policy_rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    lengths_P: tuple[Tensor, Tensor] | None = None,
) -> DPOLoss:
    """-log sigmoid(beta h), h = log(pi/ref)(chosen) - log(pi/ref)(rejected) (arXiv 2305.18290, eq. 7).

    Inputs: log-probs of whole sequences [P]. `label_smoothing` e in [0, 0.5): -(1-e) log sigmoid(beta h)
    - e log sigmoid(-beta h), where a share e of the labels is taken to be wrong (conservative DPO).
    `lengths_P`: decided tokens of (chosen, rejected); each log-ratio is divided by its own, so that beta is a
    token's: an image of 1,024 codes has margins a thousand times a word's.
    """
    if beta <= 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta {beta} must be positive and label_smoothing {label_smoothing} in [0, 0.5)")
    chosen_P = policy_chosen_P - reference_chosen_P.detach()
    rejected_P = policy_rejected_P - reference_rejected_P.detach()
    if lengths_P is not None:
        if min(int(length.min()) for length in lengths_P) < 1:
            raise ValueError("a pair has a side without decided tokens: it cannot be normalised by its length; drop it")
        chosen_P, rejected_P = chosen_P / lengths_P[0], rejected_P / lengths_P[1]
    margin_P = beta * (chosen_P - rejected_P)
    loss_P = -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)
    return DPOLoss(loss_P, _metrics(beta * chosen_P.detach(), beta * rejected_P.detach()))


def _metrics(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, float]:
    margin_P = (chosen_P - rejected_P).double()
    return {
        "pairs": float(margin_P.numel()),
        "correct": float((margin_P > 0).sum()),
        "margin": float(margin_P.sum()),
        "chosen_reward": float(chosen_P.double().sum()),
        "rejected_reward": float(rejected_P.double().sum()),
    }
