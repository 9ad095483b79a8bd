"""Rewards that are somebody's own code."""

import os
from collections.abc import Sequence
from typing import Any

from rewards.base import Reward


def function(*, target: str, name: str = "", **options: Any) -> Reward:
    """Your own Python function or class, path/file.py:name or module:name."""
    from rewards.functions import load_reward

    return load_reward(target, name, options)


def remote(
    *,
    url: str,
    token_env: str = "RLMM_REWARD_TOKEN",
    columns: Sequence[str] | None = None,
    timeout_s: float = 120.0,
    retries: int = 3,
    backoff_s: float = 0.5,
    concurrency: int = 4,
    failures: int = 5,
    cooldown_s: float = 15.0,
) -> Reward:
    """A reward that `rlmm reward serve` serves, in an environment of its own."""
    from rewards.remote import connect

    if timeout_s <= 0 or concurrency < 1 or min(retries, backoff_s, failures, cooldown_s) < 0:
        raise ValueError(
            "remote needs timeout_s > 0, concurrency >= 1, and retries, backoff_s, failures and cooldown_s >= 0; got "
            f"{timeout_s}, {concurrency}, {retries}, {backoff_s}, {failures} and {cooldown_s}"
        )
    return connect(
        url,
        read_token(token_env),
        columns=columns,
        timeout_s=timeout_s,
        retries=retries,
        backoff_s=backoff_s,
        concurrency=concurrency,
        failures=failures,
        cooldown_s=cooldown_s,
    )


def read_token(name: str) -> str:
    """The token in an environment variable. Raises ValueError, without it, where there is none."""
    token = os.environ.get(name, "").strip()
    if not token:
        raise ValueError(
            f"the environment variable {name} is not set; it has the token that a served reward and its runs share, "
            "e.g. the output of `openssl rand -hex 16`"
        )
    return token
