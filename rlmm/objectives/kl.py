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
