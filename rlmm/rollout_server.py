"""`rlmm rollout-server`: a vLLM server for training runs on other devices or nodes."""

import os
from collections.abc import Sequence
from pathlib import Path

from rlmm.config.engines import RolloutServerConfig
from rlmm.config.settings import read_settings
from rlmm.policies.families.loading import load_config
from rlmm.policies.layout_io import load_layout
from rollouts.vllm_engine.launch import ServerPlan, serve
from rollouts.vllm_engine.plugin import TWO_STREAMS, served_overrides


def serve_rollouts(model: Path, host: str, port: int, settings: Sequence[str]) -> None:
    """Become the server; does not return. Raises ValueError for a model or setting that will not do."""
    config = server_config(settings)
    token = os.environ.get(config.token_env)
    if not token:
        raise ValueError(
            f"the environment variable {config.token_env} is not set; it has the key that training runs must show, "
            "e.g. the output of `openssl rand -hex 16`"
        )
    serve(server_plan(model, host, config), port, token)


def server_config(settings: Sequence[str]) -> RolloutServerConfig:
    """What `key=value` settings make."""
    return read_settings(RolloutServerConfig, settings, "kv_megabytes=4096")


def server_plan(model: Path, host: str, config: RolloutServerConfig) -> ServerPlan:
    """How to serve the policy in a folder: in the dtype it was saved in, unless the settings name another."""
    found, layout = load_config(model), load_layout(model)
    if layout.mask is not None:
        raise ValueError(
            f"{model} is a masked policy, and vLLM would decide one token after the other; use engine.kind torch"
        )
    overrides = served_overrides(layout, found, (found.architectures or [""])[0], together=config.two_streams)
    if config.two_streams and overrides.get("architectures") != [TWO_STREAMS]:
        raise ValueError(
            f"{model} is no Llama whose layout has a null token, so no request can carry both streams of a guided "
            "sample; leave out two_streams, and they are drawn in pairs"
        )
    return ServerPlan(
        model,
        max_length=config.positions(found.get_text_config().max_position_embeddings),
        dtype=config.dtype or str(found.dtype or "float32").removeprefix("torch."),
        max_rows=config.max_rows,
        max_prompt_tokens=config.max_prompt_tokens,
        kv_bytes=config.kv_megabytes << 20,
        tensor_parallel=config.tensor_parallel,
        host=host,
        enforce_eager=config.enforce_eager,
        overrides=overrides,
    )
