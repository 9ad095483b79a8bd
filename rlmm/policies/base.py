"""The contract every policy family keeps: logits, log-probs that say what they are, and weights one at a time."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rlmm.objectives.legality import LogProbKind
from rollouts.contract import Layout
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class LogProbs:
    """Log-probs [B, S] of what a trajectory decided, 0 outside its targets, and what kind of quantity they are.

    `entropy_BS` is the entropy of each decision's law, in nats, without gradient unless that was asked for.
    """

    kind: LogProbKind
    logp_BS: Tensor
    entropy_BS: Tensor


@dataclass(frozen=True)
class SequenceBatch:
    """Supervised sequences, right-padded. T positions; position t's target is predicted from what precedes it.

    ids_BT int64; mask_BT bool (False: padding); target_BT bool (in the loss); modality_BT int8 (0 text, 1 image).
    """

    ids_BT: Tensor
    mask_BT: Tensor
    target_BT: Tensor
    modality_BT: Tensor

    def to(self, device: torch.device | str) -> "SequenceBatch":
        return SequenceBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class Policy(Protocol):
    """What the stages need of a family. `model` arguments take the wrapped module (DDP, DeepSpeed) to go through."""

    layout: Layout

    @property
    def model(self) -> nn.Module: ...

    @property
    def log_prob_kind(self) -> LogProbKind: ...

    def encode_prompt(self, prompt: str) -> list[int]: ...

    def log_probs(
        self, trajectory: Trajectory, *, model: nn.Module | None = None, entropy_gradient: bool = False
    ) -> LogProbs: ...

    def sequence_log_probs(self, batch: SequenceBatch, *, model: nn.Module | None = None) -> Tensor: ...

    def named_weights(self) -> Iterable[tuple[str, Tensor]]: ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, log-probs are those of the reference: the adapter switched off, or a frozen copy in place."""
        ...

    def save(self, folder: Path) -> None: ...
