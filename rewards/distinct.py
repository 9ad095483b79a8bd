"""Copies within a group: a policy that draws one picture over and over has nothing to learn from its group."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rewards.base import Sample, Score
from rewards.guards import FLOOR, NEAR_SHARE, THUMBNAIL, distances, fingerprint, near_duplicates
from rewards.images import load_or_invalid


class DistinctReward:
    """The share of the other samples of its group that a picture is not alike, by `guards.near_duplicates`: 1 for one
    of its own, 0 where all are one and the same. Only the first of a sample's images is compared. Part `apart`: how far
    it is from the others on average (`guards.distances`), which tells slight variations from pictures of their own.

    A picture that does not decode is invalid output and is no copy of anything; a group with fewer than two others is
    unavailable. No gold pair: of two copies neither is the better one.
    """

    name = "distinct"
    whole_groups: Literal[True] = True

    def fingerprint(self) -> str:
        """Version of the formula and its constants."""
        return f"distinct/2 {THUMBNAIL} {NEAR_SHARE} {FLOOR}"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order; `samples` are whole groups."""
        loaded = [load_or_invalid(sample) for sample in samples]
        scores = {row: item for row, item in enumerate(loaded) if isinstance(item, Score)}
        groups: dict[str, list[int]] = {}
        for row, item in enumerate(loaded):
            if not isinstance(item, Score):
                groups.setdefault(samples[row].group_id, []).append(row)
        for rows in groups.values():
            if len(rows) < 2:
                scores[rows[0]] = Score.unavailable("the group has no other picture to differ from")
                continue
            prints = [fingerprint(item[0]) for row in rows if isinstance(item := loaded[row], list)]
            others_N = (near_duplicates(prints) & ~np.eye(len(rows), dtype=bool)).sum(axis=1) / (len(rows) - 1)
            apart_N = distances(prints).sum(axis=1) / (len(rows) - 1)
            each = zip(rows, others_N, apart_N, strict=True)
            scores |= {row: Score.ok(1 - float(alike), apart=float(apart)) for row, alike, apart in each}
        return [scores[row] for row in range(len(samples))]
