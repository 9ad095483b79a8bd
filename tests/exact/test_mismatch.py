"""Importance weights between sampler and trainer, by summing over every sequence, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlmm.objectives.mismatch import mismatch_weights
from rlmm.objectives.policy_gradient import clipped_policy_loss
from tests.exact.test_policy_gradient import Chain, expected_reward, make_chain

WIDE: dict[str, Any] = {"low": 0.0, "high": float("inf")}


def corrected_gradient(chain: Chain, sampler_NS: Tensor, kind: str, **bounds: float) -> Tensor:
    """Expected gradient of the weighted loss, with sequences drawn from the sampler and one update a rollout."""
    logp_NS = chain.logp()
    loss = clipped_policy_loss(
        logp_NS, logp_NS.detach(), chain.reward_N, clip_low=0.2, clip_high=0.2, target_mask_BS=chain.mask_NS
    )
    weight_NS = mismatch_weights(kind, logp_NS, sampler_NS, chain.mask_NS, **bounds)  # pyrefly: ignore
    drawn_N = sampler_NS.sum(1).exp()
    return chain.gradient((drawn_N[:, None] * weight_NS * loss.loss_BS).sum())


def pair(seed: int = 7) -> tuple[Chain, Tensor]:
    """The trainer's policy of one decision, and the log-probs of a sampler a little off."""
    chain, other = make_chain(positions=1, seed=seed), make_chain(positions=1, seed=seed + 1)
    return chain, (0.7 * chain.logp() + 0.3 * other.logp()).detach().log_softmax(0)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_without_bounds_the_gradient_is_exact_whatever_the_sampler(kind: str) -> None:
    chain, sampler_NS = pair()
    exact = -chain.gradient(expected_reward(chain))
    torch.testing.assert_close(corrected_gradient(chain, sampler_NS, kind, **WIDE), exact, rtol=0, atol=1e-12)
    plain = corrected_gradient(chain, chain.logp().detach(), kind, **WIDE)  # a sampler that agrees
    torch.testing.assert_close(plain, exact, rtol=0, atol=1e-12)


def test_the_bias_of_truncation_and_masking_is_what_is_cut_off() -> None:
    chain, sampler_NS = pair()
    ratio_N = (chain.logp().detach() - sampler_NS).exp()[:, 0]
    low, high = 0.9, float(ratio_N.sort().values[-2]) + 1e-9
    assert (ratio_N > high).sum() == 1 and (ratio_N < low).any()
    drawn_N = sampler_NS.exp()[:, 0]
    for kind, weight_N in (
        ("truncate", ratio_N.clamp(max=high)),
        ("mask", torch.where((ratio_N >= low) & (ratio_N <= high), ratio_N, 0.0)),
        ("reject", ((ratio_N >= low) & (ratio_N <= high)).double()),
    ):
        expected = -chain.gradient((drawn_N * weight_N * chain.reward_N * chain.logp()[:, 0]).sum())
        found = corrected_gradient(chain, sampler_NS, kind, low=low, high=high)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_row_is_rejected_whole_by_its_mean_over_targets() -> None:
    ratio = torch.tensor([[4.0, 0.25, 9.0], [4.0, 1.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    sampler = old - ratio.log()
    weight = mismatch_weights("reject", old, sampler, mask, low=0.5, high=1.5)  # geometric means 1 and 2
    assert weight.tolist() == [[1, 1, 1], [0, 0, 1]]
    poisoned = sampler.masked_fill(~mask, float("nan"))
    for kind in ("truncate", "mask", "reject"):
        assert mismatch_weights(kind, old, poisoned, mask, low=0.5, high=1.5).isfinite().all()
    assert mismatch_weights("mask", old, sampler, mask, low=0.5, high=1.5).tolist() == [[0, 0, 1], [0, 1, 1]]


def test_weights_have_no_gradient_and_an_unknown_one_is_named() -> None:
    old = torch.zeros(1, 1, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert not mismatch_weights("truncate", old, torch.zeros(1, 1), mask, low=0.5, high=2.0).requires_grad
    with pytest.raises(ValueError, match="unknown mismatch correction 'trunc'. Nearest: truncate"):
        mismatch_weights("trunc", old, old, mask, low=0.5, high=2.0)
