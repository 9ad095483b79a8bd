"""A reward that compares the samples of a group, as a class, which a package of its own may bring.

In the recipe: ``- {function: "examples/group_reward.py:Finest", options: {step: 2}}``. Or by a name: with this in the
pyproject.toml of an installed package, ``- {name: finest, options: {step: 2}}``::

    [project.entry-points."rlmm.rewards"]
    finest = "my_package.rewards:Finest"
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from rewards.base import Sample, Score
from rewards.gold import GoldPair


class Finest:
    """The share of the other samples of its group that have less detail than a picture, 0 to 1; ties are a half."""

    name = "finest"
    whole_groups = True  # each call has whole groups, and no score is kept for equal pictures

    def __init__(self, step: int = 1) -> None:
        self.step = step

    def fingerprint(self) -> str:
        """What decides a score: a run that goes on asks for the same."""
        return f"finest/1 step={self.step}"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order."""
        detail = [self._detail(sample.images[0]) for sample in samples]
        scores: list[Score] = []
        for at, sample in enumerate(samples):
            others = [i for i, other in enumerate(samples) if other.group_id == sample.group_id and i != at]
            wins = [(detail[at] > detail[i]) + (detail[at] == detail[i]) / 2 for i in others]
            scores.append(Score.ok(sum(wins) / len(wins)) if wins else Score.unavailable("nothing to compare with"))
        return scores

    def gold(self) -> list[GoldPair]:
        """What the reward must rank rightly before a run starts: good above bad, as a group of two."""
        stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (8, 8)).repeat(2 * self.step, axis=1))
        good, bad = (Sample(str(i), "g", "", (image,)) for i, image in enumerate((stripes, Image.new("L", (16, 8)))))
        return [GoldPair(good, bad, "stripes against one colour")]

    def _detail(self, image: Image.Image) -> float:
        """Mean step in brightness between pixels that are `step` apart in a row."""
        light = np.asarray(image.convert("L"), dtype=float)
        return float(np.abs(light[:, self.step :] - light[:, : -self.step]).mean())
