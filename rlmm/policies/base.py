"""The contract every policy family keeps: logits, log-probs that say what they are, and weights one at a time."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rlmm.objectives.estimators import Estimator
from rlmm.objectives.legality import LogProbKind
from rollouts.contract import Layout
from rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class LogProbs:
    """Log-probs [B, S] of what a trajectory decided, 0 outside its targets, and what kind of quantity they are.

    `entropy_BS` is the entropy of each decision's law, in nats, without gradient unless that was asked for. `scale_BS`:
    where only some decisions were evaluated, what each counts for in a sum over its row, 0 for the others. `upper_BS`:
    an upper estimate beside a lower one, where asked for. `draws_Bn`: where noise is drawn, what each draw alone makes
    of a row's log-prob; their mean is the row's sum. `figures`: sums over rows that say how good the estimate is, by
    the name they are logged under, each with what to divide it by.
    """

    kind: LogProbKind
    logp_BS: Tensor
    entropy_BS: Tensor
    scale_BS: Tensor | None = None
    upper_BS: Tensor | None = None
    draws_Bn: Tensor | None = None
    figures: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class SequenceBatch:
    """Supervised sequences, right-padded. T positions; position t's target is predicted from what precedes it.

    ids_BT int64; mask_BT bool (False: padding); target_BT bool (in the loss); modality_BT int8 (0 text, 1 image).
    noised_BT bool, for masked families alone: which positions the policy sees as masked, and learns to fill in.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    target_BT: Tensor
    modality_BT: Tensor
    noised_BT: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "SequenceBatch":
        """With every tensor changed."""
        present = {n: getattr(self, n) for n in self.__dataclass_fields__ if getattr(self, n) is not None}
        return SequenceBatch(**{name: change(value) for name, value in present.items()})

    def to(self, device: torch.device | str) -> "SequenceBatch":
        return self.each(lambda value: value.to(device))


class Policy(Protocol):
    """What the stages need of a family. `model` arguments take the wrapped module (DDP, DeepSpeed) to go through."""

    layout: Layout

    @property
    def model(self) -> nn.Module: ...

    @property
    def log_prob_kind(self) -> LogProbKind: ...

    def encode_prompt(self, prompt: str) -> list[int]: ...

    def log_probs(
        self,
        trajectory: Trajectory,
        *,
        model: nn.Module | None = None,
        entropy_gradient: bool = False,
        estimator: Estimator | None = None,
    ) -> LogProbs: ...

    def sequence_log_probs(self, batch: SequenceBatch, *, model: nn.Module | None = None) -> Tensor: ...

    @property
    def gathering(self) -> nn.Module | None:
        """The `model` of forwards between updates: None, or where training keeps each weight in parts what gathers them
        module by module. Such forwards are collectives: all processes make the same number of them."""
        ...

    def image_hidden(self, trajectory: Trajectory) -> Tensor:
        """For codecs that read it: what the last layer holds at drawn images [B, 1 + L, H]."""
        ...

    def named_weights(self) -> Iterable[tuple[str, Tensor]]: ...

    def whole(self) -> AbstractContextManager[None]:
        """Inside, what is read without `model` is there whole, also where training keeps each weight in parts. All
        processes enter it."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, log-probs are those of the reference: the adapter switched off, or a frozen copy in place."""
        ...

    def save(self, folder: Path) -> None: ...


def streams_needed(trajectory: Trajectory) -> list[str]:
    """Streams of a trajectory that its laws are replayed with. Raises ValueError where one was not recorded."""
    needed: list[str] = []
    for span in trajectory.spans:
        needed += [name for name in span.law.streams(replay=True) if name not in needed]
    missing = [name for name in needed if name not in trajectory.streams]
    if missing:
        raise ValueError(
            f"the law needs the streams {missing} and the trajectory holds {sorted(trajectory.streams)}; "
            "sample with an engine that records every stream of the law"
        )
    return needed
