"""The engine takes the trainer's weights, and is believed only by their fingerprint."""

from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Engine
from rollouts.fingerprint import weights_fingerprint


def fingerprint(policy: TransformerPolicy, engine: Engine) -> str:
    """The policy's, in the engine's dtype."""
    return weights_fingerprint(policy.named_weights(), engine.dtype)


def synced(policy: TransformerPolicy, engine: Engine, rollout: int) -> str:
    """Hand the engine the weights, as version `rollout`; their fingerprint. Raises RuntimeError where the engine has
    others."""
    engine.sync(policy.named_weights(), rollout)
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
