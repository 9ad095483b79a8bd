"""Rollout engines by the kind a recipe names."""

from rlmm.config.stages import TorchEngineConfig
from rlmm.policies.causal import CausalPolicy
from rollouts.contract import Engine
from rollouts.torch_engine.causal import TorchEngine


def build_engine(config: TorchEngineConfig, policy: CausalPolicy) -> Engine:
    """The engine of a stage. A new kind is one config class in `rlmm.config.stages` and one entry here."""
    return TorchEngine(policy, num_layers=policy.base.config.num_hidden_layers, max_rows=config.max_rows)
