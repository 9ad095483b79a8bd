"""What a GRPO loss reads of its samples."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class GrpoBatch:
    """Rows of one micro-batch. `advantage` is [B], or [B, S] where tokens earn apart. `weight_BS` sums, with the
    others', to the step's denominators; `gate`: before the first update of a rollout, when trainer and sampler must
    agree; `entropy_coefficient`: of this step's bonus."""

    trajectory: Trajectory
    advantage: Tensor
    kept_B: Tensor
    weight_BS: Tensor
    gate: bool
    old_logp_BS: Tensor | None = None
    reference_logp_BS: Tensor | None = None
    reference_draws_Bn: Tensor | None = None
    entropy_coefficient: float = 0.0

    def to(self, device: torch.device | str) -> "GrpoBatch":
        names = ("advantage", "kept_B", "weight_BS", "old_logp_BS", "reference_logp_BS", "reference_draws_Bn")
        moved = {n: getattr(self, n).to(device) for n in names if getattr(self, n) is not None}
        return replace(self, trajectory=self.trajectory.to(device), **moved)
