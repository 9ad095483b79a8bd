"""Rollout engines by the kind a recipe names."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlmm.config.stages import EngineConfig, TorchEngineConfig, VllmEngineConfig
from rlmm.policies.causal import CausalPolicy
from rollouts.contract import Engine
from rollouts.torch_engine.causal import TorchEngine


def build_engine(config: EngineConfig, policy: CausalPolicy) -> Engine:
    """The engine of a stage. A new kind is one config class in `rlmm.config.stages` and one entry here."""
    return ENGINES[config.kind](config, policy)


def _torch(config: TorchEngineConfig, policy: CausalPolicy) -> Engine:
    return TorchEngine(policy, num_layers=policy.base.config.num_hidden_layers, max_rows=config.max_rows)


def _vllm(config: VllmEngineConfig, policy: CausalPolicy) -> Engine:
    from rollouts.vllm_engine.engine import VllmEngine

    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        return VllmEngine(
            Path(folder),
            policy.layout,
            max_length=policy.base.config.max_position_embeddings,
            dtype=str(policy.base.dtype).removeprefix("torch."),
            max_rows=config.max_rows,
            max_prompt_tokens=config.max_prompt_tokens,
            kv_bytes=config.kv_megabytes << 20,
        )


ENGINES: dict[str, Callable[[Any, CausalPolicy], Engine]] = {"torch": _torch, "vllm": _vllm}
