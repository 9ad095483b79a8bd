"""Scored samples as rollout files hold them, and the pairs that are made of them."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rlmm.config.stages import GrpoStage
from rlmm.data import Dataset, Example
from rlmm.policies.layout_io import read_codes
from rlmm.seeds import epoch_indices
from rlmm.train import experience as phases
from rlmm.train.pairing import Candidate
from rollouts.contract import Layout
from rollouts.store import read_trajectory
from rollouts.trajectory import Trajectory

NAMED = 5
"""Samples, pairs and prompts that are named, of each reason that leaves some out."""


@dataclass(frozen=True)
class Drawn:
    """A scored sample and where it comes from. `image` and `sources` as PNG; `law` as JSON."""

    sample_id: str
    group_id: str
    prompt: str
    image: bytes | None
    codes: tuple[int, ...] | None
    text: str | None
    candidate: Candidate
    sources: tuple[bytes, ...]
    weights_version: int
    law: str
    file: str


@dataclass(frozen=True)
class Paired:
    """A pair and the samples that made it."""

    chosen: Drawn
    rejected: Drawn

    @property
    def margin(self) -> float:
        assert self.chosen.candidate.score is not None and self.rejected.candidate.score is not None
        return self.chosen.candidate.score - self.rejected.candidate.score


@dataclass
class Found:
    """Pairs of all prompts, and what was left out: how much by reason, and the first of each reason by name."""

    pairs: list[Paired] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    prompts: int = 0
    samples: int = 0
    without: int = 0
    """Prompts of which no pair came."""

    def leave_out(self, reason: str, group: Sequence[Drawn], which: Sequence[int] = ()) -> None:
        """Counts samples of a group (two of them: a pair; none: the prompt) and names the first of each reason."""
        self.left_out[reason] += 1
        if self.left_out[reason] > NAMED:
            return
        ids = " and ".join(group[number].sample_id for number in which)
        margin = f" ({Paired(*(group[number] for number in which)).margin:.4g})" if len(which) == 2 else ""
        self.named.append(f"{ids or group[0].group_id}: {reason}{margin}; prompt {group[0].prompt!r:.80}")


def read_drawn(path: Path, layout: Layout, penalty: float) -> list[Drawn]:
    """The samples of a rollout file; an invalid output has the score `penalty`."""
    made, columns = read_trajectory(path)
    codes = read_codes(layout, made.ids[:, -layout.grid.length :]).tolist() if made.spans[-1].kind == "image" else None
    law, ended = json.dumps([span.to_dict() for span in made.spans]), _ended(made)
    written = any(span.kind == "text" for span in made.spans)
    sources = columns.get("source_images") or [[]] * len(made)
    return [
        Drawn(
            sample_id=made.sample_id[row],
            group_id=made.group_id[row],
            prompt=columns["prompt"][row],
            image=columns["image"][row],
            codes=None if codes is None else tuple(codes[row]),
            text=columns["text"][row] if written else None,
            candidate=Candidate(
                _score(columns["reward_status"][row], columns["reward"][row], penalty),
                made.ids[row, made.target_mask[row]].tolist(),
                ended[row],
            ),
            sources=tuple(sources[row]),
            weights_version=made.weights_version,
            law=law,
            file=path.name,
        )
        for row in range(len(made))
    ]


def _score(status: str, value: float | None, penalty: float) -> float | None:
    if status == "invalid_output":
        return penalty
    return value if value is not None and math.isfinite(value) else None


def _ended(made: Trajectory) -> list[bool]:
    """Whether each row's text, where it has one, came to its end."""
    ended_B = np.ones(len(made), dtype=bool)
    for index, span in enumerate(made.spans):
        if span.kind == "text":
            stops_BS = torch.isin(made.ids, torch.tensor(span.stop, dtype=torch.long)) & (made.span == index)
            ended_B &= (stops_BS & made.target_mask).any(1).numpy()
    return ended_B.tolist()


def group_row(group: str, config: GrpoStage, size: int, seed: int) -> int:
    """The data row that a group of a GRPO stage was sampled for: the rollout's prompts, and the replacements of flat
    groups, are functions of their numbers (`rlmm.train.rounds`)."""
    rollout, _, place = group.partition("/")
    at, _, extra = place.partition("+")
    count = config.prompts_per_step
    if not extra:
        return epoch_indices(size, int(rollout) * count, count, seed, "prompts")[int(at)]
    first = (int(rollout) * config.resample_flat + int(extra) - 1) * count
    return epoch_indices(size, first, count, seed, "replacements")[int(at)]


def with_rows(drawn: Sequence[Drawn], data: Dataset, row_of: Callable[[str], int]) -> Iterator[tuple[Drawn, Example]]:
    """Each sample with the row that it was drawn for, whose source images it takes. ValueError where that row has
    another prompt: the data are no longer what they were."""
    rows: dict[str, Example] = {}
    for one in drawn:
        if one.group_id not in rows:
            rows[one.group_id] = data[row_of(one.group_id)]
        example = rows[one.group_id]
        if example.prompt != one.prompt:
            raise ValueError(
                f"{one.file}: sample {one.sample_id} has the prompt {one.prompt!r:.80}, its row "
                f"{example.prompt!r:.80}; the data have changed since: use samples drawn anew (leave `rollouts` out)"
            )
        yield replace(one, sources=tuple(phases.png_bytes(image) for image in example.sources)), example


def picture(png: bytes) -> Image.Image:
    return Image.open(BytesIO(png))
