"""Log-probs of a rollout's rows under weights that are held still: the old ones, the reference's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlmm.objectives.estimators import Estimator
from rlmm.policies.transformer import TransformerPolicy
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class Replayed:
    """logp_BS, and draws_Bn where noise is drawn (`LogProbs`); float32, on the CPU."""

    logp_BS: Tensor
    draws_Bn: Tensor | None


@torch.no_grad()
def replay(policy: TransformerPolicy, trajectory: Trajectory, estimator: Estimator | None, size: int) -> Replayed:
    """Under the policy's present weights, `size` rows at a time. Where weights are in parts every process has as many
    rows."""
    runs = [list(range(at, min(at + size, len(trajectory)))) for at in range(0, len(trajectory), size)]
    device, model = policy.base.device, policy.gathering
    found = [policy.log_probs(trajectory.rows(rows).to(device), model=model, estimator=estimator) for rows in runs]
    draws = [one.draws_Bn for one in found if one.draws_Bn is not None]
    return Replayed(_joined([one.logp_BS for one in found]), _joined(draws) if draws else None)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).cpu().float()
