"""The engine takes the trainer's weights, and is believed only by their fingerprint."""

from collections.abc import Iterable

import torch
from torch import Tensor

from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Engine
from rollouts.fingerprint import weights_fingerprint


def handed(policy: TransformerPolicy, engine: Engine) -> Iterable[tuple[str, Tensor]]:
    """The policy's weights as the engine wants them: full, or with adapters apart."""
    return policy.weights_apart() if engine.takes_adapters else policy.named_weights()


def fingerprint(policy: TransformerPolicy, engine: Engine) -> str:
    """The policy's, in the engine's dtype. Where adapters are handed over apart, of them and the base in float32: the
    change of a step may be less than what rounds an adapter."""
    return weights_fingerprint(handed(policy, engine), torch.float32 if engine.takes_adapters else engine.dtype)


def synced(policy: TransformerPolicy, engine: Engine, rollout: int) -> str:
    """Hand the engine the weights, as version `rollout`; their fingerprint. Raises RuntimeError where the engine has
    others."""
    engine.sync(handed(policy, engine), rollout)
    mine = fingerprint(policy, engine)
    compare(mine, engine.fingerprint(), rollout)
    return mine


def compare(mine: str, theirs: str, rollout: int) -> None:
    """Raises RuntimeError where the engine's fingerprint (`theirs`) is not the trainer's."""
    if mine != theirs:
        raise RuntimeError(
            f"after the weight sync of rollout {rollout} the engine's weights ({theirs}) are not the trainer's "
            f"({mine}); its samples would be of another policy. Where engine.urls name servers, the likely cause is "
            "that another run gives its weights to one of them, too: each run needs servers of its own. Else this is "
            "a fault of the engine: use engine.kind torch, and report it"
        )
