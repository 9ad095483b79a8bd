"""DPO on pairs of images of one prompt: the batches of a step and its loss.

Shapes: N stored pairs, P pairs of a micro-batch, T positions of a sequence or codes of an image, as named.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlmm.objectives.dpo import dpo_loss
from rlmm.policies.base import Policy, SequenceBatch
from rlmm.policies.layout_io import supervised_batch
from rlmm.seeds import epoch_indices
from rlmm.train.metrics import Meter
from rlmm.train.processes import share
from rollouts.trajectory import IMAGE


@dataclass(frozen=True)
class PreferencePairs:
    """Prompts [N] with the codes [N, T] (int64) of the image preferred and of the one it was preferred to."""

    prompts: Sequence[str]
    chosen_NT: Tensor
    rejected_NT: Tensor

    def __post_init__(self) -> None:
        if self.chosen_NT.shape != self.rejected_NT.shape or len(self.prompts) != len(self.chosen_NT):
            raise ValueError(
                f"{len(self.prompts)} prompts with chosen codes {tuple(self.chosen_NT.shape)} and rejected ones "
                f"{tuple(self.rejected_NT.shape)}; give one prompt and two images of equal size a pair"
            )


@dataclass(frozen=True)
class DpoBatch:
    """2P sequences, the P chosen ones first, whose targets are the images alone: the prompt is given. `weight` is
    1 / (pairs of the step)."""

    sequences: SequenceBatch
    weight: float

    def to(self, device: torch.device | str) -> "DpoBatch":
        return replace(self, sequences=self.sequences.to(device))


def pair_batch(policy: Policy, pairs: PreferencePairs, rows: Sequence[int], weight: float) -> DpoBatch:
    """The pairs at `rows` as one batch."""
    prompts = [policy.encode_prompt(pairs.prompts[row]) for row in rows]
    codes = torch.cat([pairs.chosen_NT[list(rows)], pairs.rejected_NT[list(rows)]]).tolist()
    both = supervised_batch(policy.layout, prompts * 2, codes)
    return DpoBatch(replace(both, target_BT=both.target_BT & (both.modality_BT == IMAGE)), weight)


class PairSource:
    """Step -> this process's micro-batches of pairs."""

    nothing_counts = False

    def __init__(
        self, policy: Policy, pairs: PreferencePairs, *, batch_size: int, micro_batch_size: int, seed: int
    ) -> None:
        rows = share(batch_size, "batch_size")
        if (rows.stop - rows.start) % micro_batch_size:
            raise ValueError(
                f"{rows.stop - rows.start} pairs a process are not a multiple of micro_batch_size {micro_batch_size}; "
                "change either"
            )
        self.policy, self.pairs, self.rows, self.seed = policy, pairs, rows, seed
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.micro_batches_per_step = (rows.stop - rows.start) // micro_batch_size

    def micro_batches(self, step: int) -> list[DpoBatch]:
        size = self.micro_batch_size
        picked = epoch_indices(len(self.pairs.prompts), step * self.batch_size, self.batch_size, self.seed, "pairs")
        mine = picked[self.rows]
        return [
            pair_batch(self.policy, self.pairs, mine[at : at + size], 1 / self.batch_size)
            for at in range(0, len(mine), size)
        ]


def dpo_step_loss(
    policy: Policy,
    model: nn.Module,
    batch: DpoBatch,
    meter: Meter,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    by_length: bool = False,
) -> Tensor:
    """This micro-batch's share of the step's mean pair loss (`objectives.dpo.dpo_loss`).

    The reference is the policy's own (`Policy.reference`), read here and without gradient. `by_length` divides each
    log-ratio by the image's decided tokens.
    """
    sequences = batch.sequences
    with torch.no_grad(), policy.reference():
        reference_chosen_P, reference_rejected_P = policy.sequence_log_probs(sequences).sum(1).chunk(2)
    chosen_P, rejected_P = policy.sequence_log_probs(sequences, model=model).sum(1).chunk(2)
    length_P, other_P = sequences.target_BT.sum(1).chunk(2)
    found = dpo_loss(
        chosen_P,
        rejected_P,
        reference_chosen_P,
        reference_rejected_P,
        beta,
        label_smoothing=label_smoothing,
        lengths_P=(length_P, other_P) if by_length else None,
    )
    pairs = found.metrics["pairs"]
    for name, total in found.metrics.items():
        if name != "pairs":
            meter.add(f"dpo/{name}", total, pairs)
    return found.loss_P.sum() * batch.weight
