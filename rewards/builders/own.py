"""Rewards that are somebody's own code."""

from typing import Any

from rewards.base import Reward


def function(*, target: str, name: str = "", **options: Any) -> Reward:
    """Your own Python function, path/file.py:name or module:name."""
    from rewards.functions import FunctionReward

    return FunctionReward(target, name=name, options=options)
