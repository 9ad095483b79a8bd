"""The policy-gradient losses a token, and their health figures as sums that add up over processes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rlmm.objectives.records import Level, Surrogate


class PolicyLoss(NamedTuple):
    """Loss, ratio (detached) and whether the clip bounded it (which with `clipped` takes the gradient away), each
    [B, S].

    Outside the targets they are 0, 1 and False.
    """

    loss_BS: Tensor
    ratio_BS: Tensor
    clipped_BS: Tensor


def clipped_policy_loss(
    logp_BS: Tensor,
    old_logp_BS: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    level: Level = "token",
    target_mask_BS: Tensor | None = None,
) -> PolicyLoss:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), PPO (arXiv 1707.06347, eq. 7), [B, S].

    `token`: rho_t = exp(logp_t - old_logp_t). `sequence`: every token of a row has the row's geometric mean ratio
    exp(mean_t(logp_t - old_logp_t)) (GSPO, arXiv 2507.18071, eq. 7; clips there are near 3e-4). At ratio 1 both have
    the gradient -A grad logp_t summed over the row, under any token weights that are constant in a row.

    advantage: [B], or [B, S] at level token. target_mask_BS: bool, all True where not given; elsewhere the loss is 0,
    whatever the log-probs. Old log-probs and advantages get no gradient.
    """
    mask_BS = torch.ones_like(logp_BS, dtype=torch.bool) if target_mask_BS is None else target_mask_BS
    ratio_BS = _ratio(logp_BS, old_logp_BS, mask_BS, level)
    gain = _gain(advantage, logp_BS)
    free_BS = ratio_BS * gain
    bounded_BS = ratio_BS.clamp(1 - clip_low, 1 + clip_high) * gain
    loss_BS = torch.where(mask_BS, -torch.minimum(free_BS, bounded_BS), 0.0)
    return PolicyLoss(loss_BS, ratio_BS.detach(), (bounded_BS < free_BS).detach())


def cispo_policy_loss(
    logp_BS: Tensor,
    old_logp_BS: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    level: Level = "token",
    target_mask_BS: Tensor | None = None,
) -> PolicyLoss:
    """-sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logp (CISPO, arXiv 2506.13585, eq. 4-5), [B, S].

    The weight is bounded and every token keeps its gradient. Arguments as for `clipped_policy_loss`; the value is no
    estimate of the gain, its gradient is.
    """
    mask_BS = torch.ones_like(logp_BS, dtype=torch.bool) if target_mask_BS is None else target_mask_BS
    ratio_BS = _ratio(logp_BS.detach(), old_logp_BS, mask_BS, level)
    bounded_BS = ratio_BS.clamp(1 - clip_low, 1 + clip_high)
    gain = _gain(advantage, logp_BS)
    loss_BS = -bounded_BS * gain * torch.where(mask_BS, logp_BS, 0.0)
    return PolicyLoss(loss_BS, ratio_BS, bounded_BS != ratio_BS)


def reinforce_policy_loss(
    logp_BS: Tensor,
    old_logp_BS: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    level: Level = "token",
    target_mask_BS: Tensor | None = None,
) -> PolicyLoss:
    """-A logp, [B, S]: no ratio, so nothing to clip, and nothing that corrects for an older policy. Arguments as for
    `clipped_policy_loss`; the ratio is given for the record."""
    mask_BS = torch.ones_like(logp_BS, dtype=torch.bool) if target_mask_BS is None else target_mask_BS
    gain = _gain(advantage, logp_BS)
    ratio_BS = _ratio(logp_BS.detach(), old_logp_BS, mask_BS, level)
    return PolicyLoss(-gain * torch.where(mask_BS, logp_BS, 0.0), ratio_BS, torch.zeros_like(mask_BS))


POLICY_LOSSES: dict[Surrogate, Callable[..., PolicyLoss]] = {
    "clipped": clipped_policy_loss,
    "cispo": cispo_policy_loss,
    "reinforce": reinforce_policy_loss,
}


def _gain(advantage: Tensor, logp_BS: Tensor) -> Tensor:
    """Advantages as they multiply tokens: [B, 1], or [B, S]."""
    given = advantage.detach().to(logp_BS.dtype)
    return given[:, None] if given.ndim == 1 else given


def _ratio(logp_BS: Tensor, old_logp_BS: Tensor, mask_BS: Tensor, level: Level) -> Tensor:
    """exp(logp - old), a token's or its row's geometric mean [B, S]; 1 outside the mask."""
    log_ratio_BS = torch.where(mask_BS, logp_BS - old_logp_BS.detach().to(logp_BS.dtype), 0.0)
    if level == "sequence":
        mean_B1 = log_ratio_BS.sum(1, keepdim=True) / mask_BS.sum(1, keepdim=True).clamp(min=1)
        log_ratio_BS = torch.where(mask_BS, mean_B1, 0.0)
    return log_ratio_BS.exp()


def policy_metrics(policy: PolicyLoss, target_mask_BS: Tensor, kept_B: Tensor) -> dict[str, float]:
    """Sums over the decided tokens of kept rows; sums of parts add up to those of the whole."""
    counted_BS = target_mask_BS & kept_B[:, None]
    ratio = policy.ratio_BS[counted_BS].double()
    clipped = policy.clipped_BS[counted_BS]
    return {
        "tokens": float(ratio.numel()),
        "clipped_low": float((clipped & (ratio < 1)).sum()),
        "clipped_high": float((clipped & (ratio > 1)).sum()),
        "ratio": float(ratio.sum()),
        "ratio_squared": float((ratio**2).sum()),
        "kl": float((ratio - 1 - ratio.log()).sum()),
    }


def summarise_policy_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Clip fractions, mean ratio, effective sample size as a share of the tokens (Kish: (sum rho)^2 / (n sum
    rho^2)) and the k3 estimate of KL(old || current) a token, from the sums over all parts; empty where no
    token counted."""
    count = sums["tokens"]
    if not count:
        return {}
    return {
        "clip_fraction": (sums["clipped_low"] + sums["clipped_high"]) / count,
        "clip_fraction_low": sums["clipped_low"] / count,
        "clip_fraction_high": sums["clipped_high"] / count,
        "mean_ratio": sums["ratio"] / count,
        "ess": sums["ratio"] ** 2 / (count * sums["ratio_squared"]),
        "approx_kl": sums["kl"] / count,
    }
