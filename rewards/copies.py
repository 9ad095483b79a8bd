"""How far an edit is from its source: a copy earns nothing, however well a judge likes it. For a recipe's `gate`."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from PIL import Image

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.gold_images import scene_image
from rewards.images import CorruptImage, load_all, load_rgb
from rewards.names import nearest

WithoutSource = Literal["unavailable", "pass"]


def largest_change(image: Image.Image, source: Image.Image, side: int) -> tuple[float, float]:
    """(largest, mean) difference of the patches of two RGB pictures, each brought to side x side patches by averaging:
    of levels 0 to 1, averaged over the channels. An average over a patch forgives what a codec does to a copy, and the
    largest of them sees an edit of one small thing, which the mean over the picture does not.
    """
    one, other = (np.asarray(p.resize((side, side), Image.Resampling.BOX), np.float64) / 255 for p in (image, source))
    change = np.abs(one - other).mean(axis=2)
    return float(change.max()), float(change.mean())


class ChangedReward:
    """The largest change of any patch against the source, 0 (a copy) to 1; with several sources and images, against the
    nearest of each. Part: `mean`, the change over the whole picture.

    A sample without source image is unavailable, or with `without_source: pass` has 1. An image that does not decode is
    invalid output, a source that does not is unavailable.
    """

    def __init__(self, *, side: int = 16, without_source: WithoutSource = "unavailable", name: str = "changed") -> None:
        if not 2 <= side <= 256:
            raise ValueError(f"side, the number of patches along a picture, must be 2 to 256, got {side}")
        if without_source not in (known := get_args(WithoutSource)):
            raise ValueError(f"without_source is unavailable or pass. {nearest(str(without_source), known)}")
        self.name, self.side, self.without_source = name, side, without_source

    def fingerprint(self) -> str:
        """Version of the formula, and the settings."""
        return f"changed/1 side={self.side} without_source={self.without_source}"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order."""
        return [self._score(sample) for sample in samples]

    def gold(self) -> Sequence[GoldPair]:
        """A recoloured shape against the source unchanged."""
        source, edited = (
            scene_image({(1, 2): ("circle", color), (3, 0): ("square", "blue")}) for color in ("red", "green")
        )
        good, bad = (
            Sample(f"gold {at}", "gold", "paint the disc green", (one,), source_images=(source,))
            for at, one in enumerate((edited, source))
        )
        return [GoldPair(good, bad, "an edit against a copy of its source")]

    def _score(self, sample: Sample) -> Score:
        try:
            images = load_all(sample)
        except CorruptImage as error:
            return Score.invalid_output(str(error))
        if not sample.source_images:
            passed = self.without_source == "pass"
            return (
                Score.ok(1.0, mean=1.0)
                if passed
                else Score.unavailable("the sample has no source image to differ from")
            )
        try:
            sources = [load_rgb(source) for source in sample.source_images]
        except CorruptImage as error:
            return Score.unavailable(f"source image: {error}")
        largest, mean = min(largest_change(image, source, self.side) for image in images for source in sources)
        return Score.ok(largest, mean=mean)
