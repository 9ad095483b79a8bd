"""Importance weights for samples that were drawn under another law than the trainer's: same weights, other arithmetic.

With r = trainer's old policy / sampler, a token's, from stored log-probs. All weights are constants: no gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlmm.config.base import nearest


def _truncate(ratio_BS: Tensor, mask_BS: Tensor, low: float, high: float) -> Tensor:
    return ratio_BS.clamp(max=high)


def _mask(ratio_BS: Tensor, mask_BS: Tensor, low: float, high: float) -> Tensor:
    return torch.where((ratio_BS >= low) & (ratio_BS <= high), ratio_BS, 0.0)


def _reject(ratio_BS: Tensor, mask_BS: Tensor, low: float, high: float) -> Tensor:
    length_B = mask_BS.sum(1).clamp(min=1)
    mean_B = (torch.where(mask_BS, ratio_BS.log(), 0.0).sum(1) / length_B).exp()
    return ((mean_B >= low) & (mean_B <= high)).to(ratio_BS.dtype)[:, None].expand_as(ratio_BS)


CORRECTIONS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "truncate": _truncate,  # min(r, high): truncated importance sampling (Ionides 2008)
    "mask": _mask,  # r inside [low, high], 0 outside: a token too far off teaches nothing (IcePop, arXiv 2510.18855)
    "reject": _reject,  # 1 where the row's geometric mean of r is in [low, high], 0 for the whole row elsewhere
}


def mismatch_weights(
    kind: str, old_logp_BS: Tensor, sampler_logp_BS: Tensor, target_mask_BS: Tensor, *, low: float, high: float
) -> Tensor:
    """Weights [B, S] of the policy loss, 1 outside the bool targets; of the dtype of `old_logp_BS`.

    old_logp_BS: the trainer's log-probs of the policy that was sampled from; sampler_logp_BS: the sampler's own.
    `truncate` has the exact expectation of the sampled law's gradient up to what is cut off; the others leave out.
    Denominators are not touched: what is left out counts as 0.
    """
    if kind not in CORRECTIONS:
        raise ValueError(f"unknown mismatch correction {kind!r}.{nearest(kind, list(CORRECTIONS))}")
    gap_BS = old_logp_BS.detach() - sampler_logp_BS.to(old_logp_BS.dtype)
    ratio_BS = torch.where(target_mask_BS, gap_BS, 0.0).exp()
    return torch.where(target_mask_BS, CORRECTIONS[kind](ratio_BS, target_mask_BS, low, high), 1.0)
