"""A user's own weights of tokens: which decisions of a rollout the loss should listen to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.functions import load_function
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class TokenView:
    """What a weighting function sees of a micro-batch: B rows, S response positions, no gradients.

    `logp_BS` and `old_logp_BS` are log-probs under the law now and at sampling; `entropy_BS` is each decision's
    entropy in nats; all are 0 outside `trajectory.target_mask`.
    """

    trajectory: Trajectory
    logp_BS: Tensor
    old_logp_BS: Tensor
    entropy_BS: Tensor
    advantage_B: Tensor


TokenWeighting = Callable[[TokenView], Tensor]
"""Factors [B, S], finite and >= 0. A row's factors must depend on that row alone, or the gradient would change with the
size of the micro-batch."""


def load_token_weighting(target: str) -> TokenWeighting:
    """The function `path/file.py:name` or `module:name`, its answers checked. Its factors multiply the objective's
    token weights, whose denominators stay as they are.

    Raises:
        RewardLoadError: it cannot be found. ValueError, when called: its answer is no weights.
    """
    function = load_function(target, "token weighting function")

    def weights(view: TokenView) -> Tensor:
        return checked_weights(function(view), view.logp_BS, target)

    return weights


def checked_weights(given: object, logp_BS: Tensor, name: str) -> Tensor:
    """`given` as factors of the shape, type and device of `logp_BS`; ValueError where it cannot be them."""
    rule = f"return one factor >= 0 a token, shape {list(logp_BS.shape)}"
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} returned a {type(given).__name__}, not a tensor; {rule}")
    if given.shape != logp_BS.shape:
        raise ValueError(f"{name} returned a tensor of shape {list(given.shape)}; {rule}")
    factor_BS = given.detach().to(logp_BS)
    wrong = ~torch.isfinite(factor_BS) | (factor_BS < 0)
    if wrong.any():
        raise ValueError(f"{name} returned {float(factor_BS[wrong][0])} for {int(wrong.sum())} tokens; {rule}")
    return factor_BS
