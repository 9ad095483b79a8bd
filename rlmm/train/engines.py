"""Rollout engines by the kind a recipe names."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlmm.config.stages import EngineConfig, TorchEngineConfig, VllmEngineConfig
from rlmm.policies.causal import CausalPolicy
from rollouts.contract import Engine
from rollouts.torch_engine.causal import TorchEngine
from rollouts.torch_engine.llama import Unsupported, llama_shape
from rollouts.torch_engine.packed import PackedLlama

log = logging.getLogger(__name__)


def build_engine(config: EngineConfig, policy: CausalPolicy) -> Engine:
    """The engine of a stage. A new kind is one config class in `rlmm.config.stages` and one entry here."""
    return ENGINES[config.kind](config, policy)


def _torch(config: TorchEngineConfig, policy: CausalPolicy) -> Engine:
    layers, packed = policy.base.config.num_hidden_layers, packed_decoder(policy)
    return TorchEngine(policy, num_layers=layers, max_rows=config.max_rows, packed=packed)


def packed_decoder(policy: CausalPolicy) -> PackedLlama | None:
    """The packed decoder where the policy's model is one it computes exactly; None, and the reason logged, where not.

    Both ways sample from the same law and differ in rounding alone. The dtype is that of the stage's precision.
    """
    try:
        shape = llama_shape(policy.base)
    except Unsupported as reason:
        log.warning("sampling through the model's own forward, the slower way: %s", reason)
        return None
    packed = PackedLlama(shape, torch.bfloat16 if policy.precision == "bfloat16" else torch.float32)
    if packed.kernels is not None:
        log.info("sampling through the packed decoder with compiled kernels")
    else:
        log.warning("sampling through the packed decoder without compiled kernels: %s", packed.without)
    return packed


def _vllm(config: VllmEngineConfig, policy: CausalPolicy) -> Engine:
    from rollouts.vllm_engine.engine import VllmEngine
    from rollouts.vllm_engine.local import LocalHost

    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        host = LocalHost(
            Path(folder),
            max_length=policy.base.config.max_position_embeddings,
            dtype=str(policy.base.dtype).removeprefix("torch."),
            max_rows=config.max_rows,
            max_prompt_tokens=config.max_prompt_tokens,
            kv_bytes=config.kv_megabytes << 20,
        )
    return VllmEngine(policy.layout, [host])


ENGINES: dict[str, Callable[[Any, CausalPolicy], Engine]] = {"torch": _torch, "vllm": _vllm}
