"""Step -> micro-batches of preferences, and KTO's reference point of each step."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlmm.config.preference import PairNoise
from rlmm.policies.base import Policy
from rlmm.policies.layout_io import Supervised
from rlmm.seeds import derive, epoch_indices
from rlmm.train.preferences import Preference, PreferenceBatch, preference_batch, sequence_log_probs
from rlmm.train.processes import device, gather, share

Item = tuple[Preference, ...]
"""What is drawn together: one preference, or one of each kind from the same image and prompt."""


class PreferenceSource:
    """Step -> this process's micro-batches. A batch draws items; the K preferences of an item count with `weights`
    [K]. `reference_NKs`: log-probs of the reference, where they do not depend on the step. `point`: measures KTO's
    reference point of a step."""

    nothing_counts = False

    def __init__(
        self,
        policy: Policy,
        items: Sequence[Item],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        weights: Sequence[float] = (1.0,),
        noise: PairNoise | None = None,
        reference_NKs: Tensor | None = None,
        point: Callable[["PreferenceSource", int], float] | None = None,
    ) -> None:
        rows = share(batch_size, "batch_size")
        if (rows.stop - rows.start) % micro_batch_size:
            raise ValueError(
                f"{rows.stop - rows.start} preferences a process are not a multiple of micro_batch_size "
                f"{micro_batch_size}; change either"
            )
        self.policy, self.items, self.rows, self.seed, self.noise = policy, items, rows, seed, noise
        self.batch_size, self.micro_batch_size, self.weights = batch_size, micro_batch_size, tuple(weights)
        self.reference_NKs, self.point = reference_NKs, point
        self.micro_batches_per_step = (rows.stop - rows.start) // micro_batch_size

    def picked(self, step: int) -> list[int]:
        """Item numbers of the whole step, over all processes."""
        return epoch_indices(len(self.items), step * self.batch_size, self.batch_size, self.seed, "pairs")

    def micro_batches(self, step: int) -> list[PreferenceBatch]:
        size, places = self.micro_batch_size, range(self.batch_size)[self.rows]
        picked = self.picked(step)
        point = 0.0 if self.point is None else self.point(self, step)
        return [
            self._batch(step, places[at : at + size], [picked[p] for p in places[at : at + size]], point)
            for at in range(0, len(places), size)
        ]

    def _batch(self, step: int, places: Sequence[int], rows: Sequence[int], point: float) -> PreferenceBatch:
        reference_D = None
        if self.reference_NKs is not None:
            reference_D = self.reference_NKs[list(rows)].flatten(0, 1).T.flatten()
        return preference_batch(
            self.policy.layout,
            [one for row in rows for one in self.items[row]],
            [weight / self.batch_size for _ in rows for weight in self.weights],
            noise=self.noise,
            seeds=[derive(self.seed, "noise", step, p, k) for p in places for k in range(len(self.weights))],
            reference_D=reference_D,
            point=point,
        )


@torch.no_grad()
def reference_point(source: PreferenceSource, step: int, *, per_token: bool) -> float:
    """KTO's: the mean log-ratio of other rows' answers, at least 0 (arXiv 2402.01306, section 4.1), in nats. It is of
    the whole step, so neither the micro-batch nor the number of processes matters."""
    policy, size = source.policy, source.micro_batch_size
    rows = [source.items[row][0].sides[0] for row in source.picked(step)]
    crossed = [_crossed(row, rows[(place + 1) % len(rows)]) for place, row in enumerate(rows)]
    places, total = range(len(rows))[source.rows], 0.0
    for at in range(0, len(places), size):
        mine = places[at : at + size]
        batch = preference_batch(
            policy.layout,
            [Preference((crossed[place],), desirable=False) for place in mine],
            [1.0] * len(mine),
            noise=source.noise,
            seeds=[derive(source.seed, "point", step, place) for place in mine],
        ).to(device())
        ratio_D = sequence_log_probs(policy, batch, policy.gathering).mean(1)
        with policy.reference():
            ratio_D = ratio_D - sequence_log_probs(policy, batch, policy.gathering).mean(1)
        total += float((ratio_D.double() / (batch.length_D if per_token else 1)).sum())
    return max(0.0, sum(gather(total)) / len(rows))


def _crossed(asked: Supervised, answered: Supervised) -> Supervised:
    """One row's prompt with another's answer."""
    return replace(asked, image=answered.image, text=answered.text)
