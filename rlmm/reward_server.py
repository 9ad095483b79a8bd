"""`rlmm reward serve`: one reward as an HTTP service, in whatever environment it needs."""

from collections.abc import Callable, Sequence
from typing import Any

import yaml

from rewards.builders.own import read_token
from rlmm.config.rewards import RewardTerm
from rlmm.rewarding import build_reward


def term_of(name: str, settings: Sequence[str]) -> RewardTerm:
    """The reward `name`, or `file.py:function`, with `key=value` options. Raises ValueError where there is none."""
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"an option is written key=value, got {setting!r}")
        options[key] = yaml.safe_load(value)
    return RewardTerm.model_validate({("function" if ":" in name else "name"): name, "options": options})


def serve_reward(
    name: str,
    settings: Sequence[str],
    host: str,
    port: int,
    token_env: str,
    concurrency: int,
    max_megabytes: int,
    say: Callable[[str], None],
) -> None:
    """Build the reward, say so, and serve it until interrupted. Raises what building it raises, and ValueError without
    token."""
    from rewards.service import serve

    token = read_token(token_env)
    reward = build_reward(term_of(name, settings))
    say(f"serving {name} on http://{host}:{port}; interrupt to stop")
    serve(reward, token, host=host, port=port, concurrency=concurrency, max_megabytes=max_megabytes)
