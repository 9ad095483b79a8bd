"""Preferences as batches: pairs of sequences of one prompt, or single ones that are wanted or not.

Shapes: P preferences of a micro-batch, s sides each (2 of a pair, 1 of a single one), B = s P n sequences with n draws
of masks each, T positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlmm.config.preference import PairNoise
from rlmm.objectives.noise import noise_plan
from rlmm.policies.base import Policy, SequenceBatch
from rlmm.policies.layout_io import Supervised, supervised_batch
from rollouts.contract import Layout
from rollouts.trajectory import IMAGE


@dataclass(frozen=True)
class Preference:
    """`sides`: (chosen, rejected), answers to one prompt; or one answer, and `desirable` says whether it is wanted."""

    sides: tuple[Supervised, ...]
    desirable: bool | None = None

    def __post_init__(self) -> None:
        if (len(self.sides) == 1) != (self.desirable is not None):
            raise ValueError("a pair has two sides and no label, a single answer has a label; give either")

    @property
    def understanding(self) -> bool:
        """Whether the answers are texts, and not images."""
        return self.sides[0].image is None


@dataclass(frozen=True)
class PreferenceBatch:
    """Sequences [B, T], the first sides of all preferences before the second ones, each `draws` times in a row with
    masks of its own. Targets are the answers alone: the prompt is given. `weight_P`: each preference's share of the
    step's loss; `reference_D`: log-probs [s P] of the reference, where they are known; `point`: KTO's."""

    sequences: SequenceBatch
    weight_P: Tensor
    understanding_P: Tensor
    sides: int
    draws: int = 1
    noise_weight_BT: Tensor | None = None
    reference_D: Tensor | None = None
    desirable_P: Tensor | None = None
    point: float = 0.0

    def each(self, change: Callable[[Tensor], Tensor]) -> "PreferenceBatch":
        """With every tensor changed."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        changed = {name: change(value) for name, value in tensors.items()}
        return replace(self, sequences=self.sequences.each(change), **changed)

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        return self.each(lambda value: value.to(device))

    @property
    def length_D(self) -> Tensor:
        """Decided tokens of each sequence [s P]."""
        return self.sequences.target_BT[:: self.draws].sum(1)


def preference_batch(
    layout: Layout,
    preferences: Sequence[Preference],
    weights: Sequence[float],
    *,
    noise: PairNoise | None = None,
    seeds: Sequence[int] = (),
    reference_D: Tensor | None = None,
    point: float = 0.0,
) -> PreferenceBatch:
    """The preferences, all pairs or all single. A masked layout needs `noise`, and a seed a preference: the two images
    of a pair have the same positions masked, and so have policy and reference, which makes the margin far steadier than
    each bound. Raises ValueError where they are missing."""
    sides = len(preferences[0].sides)
    rows = [one.sides[side] for side in range(sides) for one in preferences]
    both = answers(layout, rows)
    labels = [one.desirable for one in preferences]
    batch = PreferenceBatch(
        both,
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor([one.understanding for one in preferences]),
        sides,
        reference_D=reference_D,
        desirable_P=None if labels[0] is None else torch.tensor([bool(label) for label in labels]),
        point=point,
    )
    if layout.mask is None:
        return batch
    if noise is None or len(seeds) != len(preferences):
        raise ValueError("a masked policy's log-probs are estimated: give the noise, and a seed for each preference")
    plan = noise_plan(noise.scheme, both.target_BT, [*seeds] * sides, noise.draws)
    each = both.each(lambda value: value.repeat_interleave(noise.draws, 0))
    noised = replace(each, noised_BT=plan.masks_BnS.flatten(0, 1))
    return replace(batch, sequences=noised, noise_weight_BT=plan.weight_BnS.flatten(0, 1), draws=noise.draws)


def answers(layout: Layout, rows: Sequence[Supervised]) -> SequenceBatch:
    """The rows' sequences, whose targets are the text and the image that answer the prompt, and never the prompt."""
    batch = supervised_batch(layout, rows)
    written_B1 = torch.tensor([[len(row.text) > 0] for row in rows])
    return replace(batch, target_BT=batch.target_BT & ((batch.modality_BT == IMAGE) | written_B1))


def sequence_log_probs(policy: Policy, batch: PreferenceBatch, model: torch.nn.Module | None = None) -> Tensor:
    """Log-probs of the answers [s P, draws]: exact ones once, or one estimate a draw, whose mean is the estimate."""
    logp_BT = policy.sequence_log_probs(batch.sequences, model=model)
    if batch.noise_weight_BT is None:
        return logp_BT.sum(1, keepdim=True)
    weight_BT = batch.noise_weight_BT.to(logp_BT) * batch.draws
    return (weight_BT * logp_BT).sum(1).unflatten(0, (-1, batch.draws))
