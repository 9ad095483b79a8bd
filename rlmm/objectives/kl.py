"""Estimators of KL(policy || reference), a token, from the log-probs of sampled tokens.

With d = logp - reference_logp of tokens drawn from the *current* policy (Schulman, "Approximating KL
divergence", 2020):

| kind | estimate         | expectation | expected gradient as a loss                             |
|------|------------------|-------------|---------------------------------------------------------|
| k1   | d                | KL          | 0, the score's mean: noise that pulls nowhere           |
| k2   | d^2 / 2          | not KL      | grad KL(policy || reference)                            |
| k3   | exp(-d) - 1 + d  | KL, >= 0    | grad KL(reference || policy): another divergence         |

After the first update of a rollout the tokens come from the old policy, and none of these lines holds.
`kl_loss` can weigh the estimate by the ratio exp(logp - old_logp), with its gradient: E_old[rho k] =
E_policy[k] for any parameters, so that k1 and k3 then have both the value and the gradient of KL(policy ||
reference), on and off policy; k2 has neither.

"grad" is a token's: prefixes count as drawn from the sampling law, and what a token does to the KL of later
ones is left out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlmm.config.base import nearest


def k1(difference: Tensor) -> Tensor:
    return difference


def k2(difference: Tensor) -> Tensor:
    return difference**2 / 2


def k3(difference: Tensor) -> Tensor:
    return torch.expm1(-difference) + difference


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(
    kind: str, logp_BS: Tensor, reference_logp_BS: Tensor, *, target_mask_BS: Tensor | None = None
) -> Tensor:
    """The estimate a token [B, S], differentiable in `logp_BS`; 0 outside the bool `target_mask_BS`."""
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {kind!r}.{nearest(kind, list(KL_ESTIMATORS))}")
    difference_BS = logp_BS - reference_logp_BS.detach().to(logp_BS.dtype)
    if target_mask_BS is not None:
        difference_BS = torch.where(target_mask_BS, difference_BS, 0.0)
    return KL_ESTIMATORS[kind](difference_BS)


def kl_loss(
    kind: str,
    logp_BS: Tensor,
    reference_logp_BS: Tensor,
    *,
    old_logp_BS: Tensor | None = None,
    target_mask_BS: Tensor | None = None,
) -> Tensor:
    """The KL penalty a token [B, S]; importance-weighted where `old_logp_BS` (the sampling policy's) is
    given."""
    estimate_BS = kl_estimate(kind, logp_BS, reference_logp_BS, target_mask_BS=target_mask_BS)
    if old_logp_BS is None:
        return estimate_BS
    log_ratio_BS = logp_BS - old_logp_BS.detach().to(logp_BS.dtype)
    if target_mask_BS is not None:
        log_ratio_BS = torch.where(target_mask_BS, log_ratio_BS, 0.0)
    return log_ratio_BS.exp() * estimate_BS


def bound_kl(draws_Bn: Tensor, reference_draws_Bn: Tensor, length_B: Tensor) -> Tensor:
    """k2 a row [B] of bounds that are known by draws: half the squared log-ratio a token, without bias.

    With D_n = (a draw's estimate of the policy's ELBO less one of the reference's at the same mask) / L of independent
    draws, the square of their mean is too large by its variance, so the mean of D_n D_m over n != m is taken: its
    expectation is the square of the expected difference, and its gradient's is that one's. Where a bound is tight, this
    is k2 of the sequence, on a scale that does not grow with its length L.

    draws_Bn: with gradient; reference_draws_Bn: of the same masks. Raises ValueError for fewer than two draws.
    """
    count = draws_Bn.shape[1]
    if count < 2:
        raise ValueError(f"{count} draw(s) a row: a square without bias is of two draws that are independent, or more")
    length_B1 = length_B.clamp(min=1).unsqueeze(1)
    ratio_Bn = (draws_Bn - reference_draws_Bn.detach().to(draws_Bn.dtype)) / length_B1
    pairs_B = ratio_Bn.sum(1) ** 2 - (ratio_Bn**2).sum(1)
    return pairs_B / (2 * count * (count - 1))
